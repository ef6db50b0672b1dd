# Inputs of the module that this one replaces: names, types and defaults are the same.

variable "project_code" {
  description = "First part of the names: <project_code>-<environment>-<service_name>."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z0-9_-]+$", var.project_code))
    error_message = "project_code may contain only letters, digits, \"-\" and \"_\", because it becomes part of the family of task definitions."
  }
}

variable "environment" {
  description = "Second part of the names, such as dev."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z0-9_-]+$", var.environment))
    error_message = "environment may contain only letters, digits, \"-\" and \"_\", because it becomes part of the family of task definitions."
  }
}

variable "service_name" {
  description = "Last part of the names. The ECS service is named <project_code>-<environment>-<service_name>."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z0-9_-]+$", var.service_name))
    error_message = "service_name may contain only letters, digits, \"-\" and \"_\", because it becomes part of the family of task definitions."
  }
}

variable "manager_instance_count" {
  description = "Number of manager containers. Each one registers every manager of managers_configs, and runs up to gitlab_runner_concurrency jobs."
  type        = number
  default     = 1

  validation {
    condition     = var.manager_instance_count >= 0 && floor(var.manager_instance_count) == var.manager_instance_count
    error_message = "manager_instance_count must be a whole number of at least 0."
  }
}

variable "manager_ecs_cluster_arn" {
  description = "ARN of the ECS cluster for managers, in the account and region of the AWS provider."
  type        = string

  validation {
    condition     = can(regex("^arn:[^:]+:ecs:[^:]+:[0-9]{12}:cluster/.+$", var.manager_ecs_cluster_arn))
    error_message = "manager_ecs_cluster_arn must be the ARN of an ECS cluster, such as arn:aws:ecs:us-east-2:111122223333:cluster/managers."
  }
}

variable "manager_docker_image" {
  description = "The manager image, with its registry and tag."
  type        = string

  validation {
    condition     = var.manager_docker_image != ""
    error_message = "manager_docker_image must not be empty."
  }
}

variable "manager_subnet_ids" {
  description = "Subnets of the manager containers. They need a route to GitLab, to ECS and to the tasks."
  type        = list(string)

  validation {
    condition     = length(var.manager_subnet_ids) > 0
    error_message = "manager_subnet_ids must name at least one subnet."
  }
}

variable "manager_security_group_ids" {
  description = "Security groups of the manager containers. They must allow outbound TCP 443, and the SSH port of the tasks."
  type        = list(string)

  validation {
    condition     = length(var.manager_security_group_ids) >= 1 && length(var.manager_security_group_ids) <= 5
    error_message = "manager_security_group_ids must name 1 to 5 security groups. This module creates none."
  }
}

variable "gitlab_token_secret_arn" {
  description = "ARN of a secret in Secrets Manager, or of a parameter in Parameter Store, with a registration token or, for a single manager, an authentication token. May be empty if gitlab_runner_token_secret_arns names a secret for each manager."
  type        = string

  validation {
    condition     = var.gitlab_token_secret_arn == "" || can(regex("^arn:[^:]+:(secretsmanager:[^:]+:[0-9]{12}:secret:|ssm:[^:]+:[0-9]{12}:parameter/).+$", var.gitlab_token_secret_arn))
    error_message = "gitlab_token_secret_arn must be the ARN of a secret in Secrets Manager or of a parameter in Parameter Store."
  }
}

variable "secrets_kms_key" {
  description = "Id, alias or ARN of the KMS key of the secrets, if they are encrypted with a key of your own. Empty for the keys that AWS manages, which need no permission."
  type        = string
  default     = ""
}

variable "gitlab_url" {
  description = "Address of GitLab, such as https://gitlab.com/."
  type        = string

  validation {
    condition     = can(regex("^https?://[^/]+", var.gitlab_url))
    error_message = "gitlab_url must begin with https:// or http://."
  }
}

variable "gitlab_runner_concurrency" {
  description = "Number of jobs that each manager container runs at a time."
  type        = number
  default     = 10

  validation {
    condition     = var.gitlab_runner_concurrency >= 1 && floor(var.gitlab_runner_concurrency) == var.gitlab_runner_concurrency
    error_message = "gitlab_runner_concurrency must be a whole number of at least 1."
  }
}

variable "gitlab_runner_name_prefix" {
  description = "First part of the runners' names in GitLab."
  type        = string

  validation {
    condition     = can(regex("^[[:print:]]{1,100}$", var.gitlab_runner_name_prefix))
    error_message = "gitlab_runner_name_prefix must have 1 to 100 printable characters."
  }
}

variable "managers_configs" {
  description = "The managers, by name: each is a runner with a worker of its own. The default is a sample, with which nothing can run."
  type = map(object({
    tags                     = list(string)
    limit                    = number # limited by the free addresses of the worker's subnet
    worker_docker_image      = string
    worker_cpu               = number
    worker_memory            = number
    worker_ecs_cluster_arn   = string
    worker_aws_region        = string
    worker_subnet_id         = string
    worker_security_group_id = string
    worker_ssh_user          = string
    worker_task_role_arn     = string
  }))
  default = {
    r1 = {
      tags                     = ["env1", "tool1", "tool2"]
      limit                    = 10
      worker_docker_image      = "image_1"
      worker_cpu               = 256
      worker_memory            = 512
      worker_ecs_cluster_arn   = "ecs_cluster_arn_1"
      worker_aws_region        = "region-1"
      worker_subnet_id         = "subnet-123"
      worker_security_group_id = "sg-321"
      worker_ssh_user          = "user_1"
      worker_task_role_arn     = "task_role_arn_1"
    }
  }

  validation {
    condition     = length(var.managers_configs) > 0
    error_message = "managers_configs must describe at least one manager."
  }

  validation {
    condition     = alltrue([for name in keys(var.managers_configs) : can(regex("^[A-Za-z0-9_-]{1,100}$", name))])
    error_message = "The names in managers_configs must have 1 to 100 letters, digits, \"-\" and \"_\", because they become part of the family of task definitions."
  }

  validation {
    condition     = alltrue([for config in values(var.managers_configs) : config.limit >= 0 && floor(config.limit) == config.limit])
    error_message = "limit in managers_configs must be a whole number of at least 0."
  }
}

variable "iam_permissions_boundary" {
  description = "ARN of the permissions boundary of all roles that this module creates. null or empty for none."
  type        = string
  default     = null
}

variable "tags_common" {
  description = "Tags of all resources, in addition to default_tags of the provider."
  type        = map(string)
  default     = {}
}

# The other module requires it. Here it is optional: the region is that of manager_ecs_cluster_arn.
variable "aws_region" {
  description = "Region of the AWS provider. If set, it must be the region of manager_ecs_cluster_arn."
  type        = string
  default     = null
}

# Inputs that only this module has.

variable "gitlab_runner_token_secret_arns" {
  description = "ARNs of the secrets or parameters with the authentication token of each manager, by the manager's name. A manager that is not listed uses gitlab_token_secret_arn."
  type        = map(string)
  default     = {}
  nullable    = false

  validation {
    condition     = alltrue([for arn in values(var.gitlab_runner_token_secret_arns) : can(regex("^arn:[^:]+:(secretsmanager:[^:]+:[0-9]{12}:secret:|ssm:[^:]+:[0-9]{12}:parameter/).+$", arn))])
    error_message = "gitlab_runner_token_secret_arns must have ARNs of secrets in Secrets Manager or of parameters in Parameter Store."
  }
}

variable "driver_settings" {
  description = "Settings of the driver for all managers, in the structure of its configuration file. By default, a job may not choose another task definition."
  type        = any
  default     = { Fargate = { AllowedTaskDefinitions = [] } }
  nullable    = false

  validation {
    condition     = can(keys(var.driver_settings))
    error_message = "driver_settings must be an object, such as { Fargate = { LaunchType = \"FARGATE\" } }."
  }
}

variable "managers_driver_settings" {
  description = "Settings of the driver for single managers, by the manager's name. They override driver_settings and the fields of managers_configs."
  type        = any
  default     = {}
  nullable    = false

  validation {
    condition     = can(keys(var.managers_driver_settings))
    error_message = "managers_driver_settings must be an object whose keys are names of managers."
  }
}

variable "manager_policy_arns" {
  description = "Further policies for the managers' task role, by any name: for features of the driver that need more permissions."
  type        = map(string)
  default     = {}
  nullable    = false
}

variable "manager_cpu" {
  description = "CPU units of a manager container."
  type        = number
  default     = 512
  nullable    = false
}

variable "manager_memory" {
  description = "Memory of a manager container in MiB."
  type        = number
  default     = 1024
  nullable    = false
}

variable "log_retention_days" {
  description = "Days after which CloudWatch Logs deletes the logs of managers and workers. 0 keeps them."
  type        = number
  default     = 30
  nullable    = false

  validation {
    condition     = contains([0, 1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653], var.log_retention_days)
    error_message = "log_retention_days must be a number of days that CloudWatch Logs accepts, such as 7, 30, 90 or 365."
  }
}
