resource "aws_cloudwatch_log_group" "worker" {
  name              = "/ecs/${local.full_name}/worker"
  retention_in_days = var.log_retention_days
  tags              = var.tags_common
}

resource "aws_ecs_task_definition" "worker" {
  for_each = var.managers_configs

  family                   = local.worker_families[each.key]
  requires_compatibilities = ["FARGATE"]
  network_mode             = "awsvpc"
  cpu                      = each.value.worker_cpu
  memory                   = each.value.worker_memory
  execution_role_arn       = aws_iam_role.worker_execution.arn
  task_role_arn            = each.value.worker_task_role_arn == "" ? null : each.value.worker_task_role_arn
  tags                     = var.tags_common

  container_definitions = jsonencode([
    {
      name            = "ci-coordinator" # the name that the driver expects
      image           = each.value.worker_docker_image
      essential       = true
      portMappings    = [{ containerPort = 22, hostPort = 22, protocol = "tcp" }]
      linuxParameters = { initProcessEnabled = true }
      stopTimeout     = 10
      logConfiguration = {
        logDriver = "awslogs"
        options = {
          awslogs-group         = aws_cloudwatch_log_group.worker.name
          awslogs-region        = local.region
          awslogs-stream-prefix = each.key
        }
      }
    }
  ])

  lifecycle {
    # The old revision is deregistered only once there is a new one, so that jobs can start all the time.
    create_before_destroy = true

    precondition {
      condition     = each.value.worker_aws_region == local.region
      error_message = "worker_aws_region of ${each.key} is ${each.value.worker_aws_region}, but its task definition is in ${local.region}, the region of manager_ecs_cluster_arn. Use one instance of this module for each region."
    }
  }
}

resource "aws_iam_role" "worker_execution" {
  name                 = "iam-role-${local.full_name}-worker-execution"
  assume_role_policy   = data.aws_iam_policy_document.tasks_trust.json
  permissions_boundary = local.permissions_boundary
  tags                 = var.tags_common
}

resource "aws_iam_role_policy" "worker_execution" {
  name   = "worker-execution"
  role   = aws_iam_role.worker_execution.id
  policy = data.aws_iam_policy_document.worker_execution.json
}

data "aws_iam_policy_document" "worker_execution" {
  dynamic "statement" {
    for_each = length(local.worker_repository_arns) > 0 ? [true] : []

    content {
      sid       = "LogInToRegistry"
      actions   = ["ecr:GetAuthorizationToken"]
      resources = ["*"]
    }
  }

  dynamic "statement" {
    for_each = length(local.worker_repository_arns) > 0 ? [true] : []

    content {
      sid       = "PullWorkerImages"
      actions   = ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
      resources = local.worker_repository_arns
    }
  }

  statement {
    sid       = "WriteLogs"
    actions   = ["logs:CreateLogStream", "logs:PutLogEvents"]
    resources = ["${aws_cloudwatch_log_group.worker.arn}:*"]
  }
}
