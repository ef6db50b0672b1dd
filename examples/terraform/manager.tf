locals {
  managers = {
    for name, config in var.managers_configs : name => merge(
      {
        manager_name               = name
        tag_list                   = join(",", config.tags)
        limit                      = config.limit
        worker_ecs_cluster_arn     = config.worker_ecs_cluster_arn
        worker_aws_region          = config.worker_aws_region
        worker_subnet_id           = config.worker_subnet_id
        worker_security_group_id   = config.worker_security_group_id
        worker_ssh_user            = config.worker_ssh_user
        worker_task_definition_arn = local.worker_definition_arns[name]
      },
      can(var.managers_driver_settings[name]) ? { driver_settings = var.managers_driver_settings[name] } : {},
    )
  }

  manager_environment = {
    GITLAB_URL         = var.gitlab_url
    RUNNER_NAME_PREFIX = var.gitlab_runner_name_prefix
    RUNNER_CONCURRENCY = tostring(var.gitlab_runner_concurrency)
    MANAGERS_CONFIGS   = jsonencode(local.managers)
    DRIVER_SETTINGS    = jsonencode(var.driver_settings)
    # Seconds for jobs to finish, then for cancelled jobs to end. Both, and 7 more, must fit in stopTimeout below.
    STOP_TIMEOUT     = "60"
    SHUTDOWN_TIMEOUT = "40"
  }
}

resource "aws_cloudwatch_log_group" "manager" {
  name              = "/ecs/${local.full_name}/manager"
  retention_in_days = var.log_retention_days
  tags              = var.tags_common
}

resource "aws_ecs_task_definition" "manager" {
  family                   = local.name
  requires_compatibilities = ["FARGATE"]
  network_mode             = "awsvpc"
  cpu                      = var.manager_cpu
  memory                   = var.manager_memory
  execution_role_arn       = aws_iam_role.manager_execution.arn
  task_role_arn            = aws_iam_role.manager.arn
  tags                     = var.tags_common

  container_definitions = jsonencode([
    {
      name            = "cd-ecs-${local.full_name}-manager"
      image           = var.manager_docker_image
      essential       = true
      linuxParameters = { initProcessEnabled = true }
      stopTimeout     = 120 # the longest on Fargate
      # Healthy once GitLab has accepted a token. So a deployment with bad tokens or a wrong gitlab_url leaves the previous
      # manager alone, and is rolled back.
      healthCheck = {
        command     = ["CMD-SHELL", "grep -qs '^\\[\\[runners\\]\\]' \"$CONFIG_FILE\""]
        interval    = 10
        timeout     = 5
        retries     = 3
        startPeriod = 120
      }
      environment = [for name, value in local.manager_environment : { name = name, value = value }]
      secrets     = [for name, arn in local.token_secrets : { name = name, valueFrom = arn }]
      logConfiguration = {
        logDriver = "awslogs"
        options = {
          awslogs-group         = aws_cloudwatch_log_group.manager.name
          awslogs-region        = local.region
          awslogs-stream-prefix = var.service_name
        }
      }
    }
  ])

  lifecycle {
    create_before_destroy = true

    precondition {
      condition     = var.aws_region == null || var.aws_region == local.region
      error_message = "aws_region differs from the region of manager_ecs_cluster_arn, which is ${local.region}."
    }

    precondition {
      condition     = var.gitlab_token_secret_arn != "" || length(setsubtract(keys(var.managers_configs), keys(var.gitlab_runner_token_secret_arns))) == 0
      error_message = "Each manager needs a token: set gitlab_token_secret_arn, or name a secret for each manager in gitlab_runner_token_secret_arns."
    }

    precondition {
      condition     = length(setsubtract(concat(keys(var.gitlab_runner_token_secret_arns), keys(var.managers_driver_settings)), keys(var.managers_configs))) == 0
      error_message = "gitlab_runner_token_secret_arns and managers_driver_settings may name only managers of managers_configs."
    }
  }
}

resource "aws_ecs_service" "manager" {
  name            = local.name
  cluster         = var.manager_ecs_cluster_arn
  task_definition = aws_ecs_task_definition.manager.arn
  desired_count   = var.manager_instance_count
  launch_type     = "FARGATE" # not Spot: if AWS takes a manager back, all its jobs are cancelled
  tags            = var.tags_common

  # A new manager must be healthy before the old one is stopped.
  deployment_minimum_healthy_percent = 100
  deployment_maximum_percent         = 200

  # Rebalancing would stop managers, and cancel their jobs.
  availability_zone_rebalancing = "DISABLED"

  deployment_circuit_breaker {
    enable   = true
    rollback = true
  }

  network_configuration {
    subnets          = var.manager_subnet_ids
    security_groups  = var.manager_security_group_ids
    assign_public_ip = false
  }

  # What a manager needs when it starts, and what its jobs need.
  depends_on = [
    aws_ecs_task_definition.worker,
    aws_iam_role_policy.manager,
    aws_iam_role_policy.manager_execution,
    aws_iam_role_policy.worker_execution,
    aws_iam_role_policy_attachment.manager,
  ]
}
