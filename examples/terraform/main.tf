locals {
  # ECS requires a service to be in the region and account of its cluster, so the cluster's ARN tells them.
  cluster_arn = split(":", var.manager_ecs_cluster_arn)
  partition   = local.cluster_arn[1]
  region      = local.cluster_arn[3]
  account     = local.cluster_arn[4]

  # The names are those of the module that this one replaces: the service and the roles stay what they are.
  full_name     = join("-", [var.project_code, var.environment, var.service_name])
  name          = lower(replace(local.full_name, "_", ""))
  worker_family = "task-${local.full_name}-worker"

  permissions_boundary = var.iam_permissions_boundary == "" ? null : var.iam_permissions_boundary

  # Families, not revisions: a new worker image neither changes nor restarts the managers.
  worker_families = { for name in keys(var.managers_configs) : name => "${local.worker_family}-${name}" }
  worker_definition_arns = {
    for name, family in local.worker_families :
    name => "arn:${local.partition}:ecs:${local.region}:${local.account}:task-definition/${family}"
  }

  worker_cluster_arns = distinct([
    for config in values(var.managers_configs) :
    startswith(config.worker_ecs_cluster_arn, "arn:") ? config.worker_ecs_cluster_arn : "arn:${local.partition}:ecs:${local.region}:${local.account}:cluster/${config.worker_ecs_cluster_arn}"
  ])
  worker_task_role_arns = distinct(compact([for config in values(var.managers_configs) : config.worker_task_role_arn]))

  # The repositories of images in ECR. Images of other registries need no permission.
  ecr_image = "^([0-9]{12})\\.dkr[.-]ecr(?:-fips)?\\.([a-z0-9-]+)\\.(?:amazonaws\\.com(?:\\.cn)?|on\\.aws)/([^:@]+)"
  worker_repository_arns = distinct([
    for parts in [for config in values(var.managers_configs) : try(regex(local.ecr_image, config.worker_docker_image), [])] :
    "arn:${local.partition}:ecr:${parts[1]}:${parts[0]}:repository/${parts[2]}" if length(parts) > 0
  ])
  manager_repository_arns = [
    for parts in [try(regex(local.ecr_image, var.manager_docker_image), [])] :
    "arn:${local.partition}:ecr:${parts[1]}:${parts[0]}:repository/${parts[2]}" if length(parts) > 0
  ]

  # Secrets of the manager's container. A secret in Secrets Manager may name one of its keys and a version after its own
  # ARN, which has seven parts; ECS needs all of it, and IAM the ARN.
  token_secrets = merge(
    var.gitlab_token_secret_arn == "" ? {} : { GITLAB_REGISTRATION_TOKEN = var.gitlab_token_secret_arn },
    {
      for name, arn in var.gitlab_runner_token_secret_arns :
      "GITLAB_RUNNER_TOKEN_${replace(upper(name), "/[^A-Z0-9]/", "_")}" => arn
    },
  )
  token_secret_arns = distinct([
    for arn in values(local.token_secrets) : join(":", slice(split(":", arn), 0, min(7, length(split(":", arn)))))
  ])
}
