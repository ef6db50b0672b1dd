data "aws_iam_policy_document" "tasks_trust" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ecs-tasks.amazonaws.com"]
    }

    condition {
      test     = "ArnLike"
      variable = "aws:SourceArn"
      values   = ["arn:${local.partition}:ecs:${local.region}:${local.account}:*"]
    }

    condition {
      test     = "StringEquals"
      variable = "aws:SourceAccount"
      values   = [local.account]
    }
  }
}

# What the driver does in AWS.

resource "aws_iam_role" "manager" {
  name                 = "${local.name}-task"
  assume_role_policy   = data.aws_iam_policy_document.tasks_trust.json
  permissions_boundary = local.permissions_boundary
  tags                 = var.tags_common
}

resource "aws_iam_role_policy" "manager" {
  name   = "manager"
  role   = aws_iam_role.manager.id
  policy = data.aws_iam_policy_document.manager.json
}

resource "aws_iam_role_policy_attachment" "manager" {
  for_each = var.manager_policy_arns

  role       = aws_iam_role.manager.name
  policy_arn = each.value
}

data "aws_iam_policy_document" "manager" {
  statement {
    sid       = "StartTasks"
    actions   = ["ecs:RunTask"]
    resources = [for arn in values(local.worker_definition_arns) : "${arn}:*"]

    condition {
      test     = "ArnEquals"
      variable = "ecs:cluster"
      values   = local.worker_cluster_arns
    }
  }

  statement {
    sid       = "DescribeAndStopTasks"
    actions   = ["ecs:DescribeTasks", "ecs:StopTask"]
    resources = [for arn in local.worker_cluster_arns : "${replace(arn, ":cluster/", ":task/")}/*"]
  }

  statement {
    sid       = "FindTasks"
    actions   = ["ecs:ListTasks"]
    resources = ["*"]

    condition {
      test     = "ArnEquals"
      variable = "ecs:cluster"
      values   = local.worker_cluster_arns
    }
  }

  # To stop the tasks of managers that have ended without doing so.
  statement {
    sid       = "FindStoppedManagers"
    actions   = ["ecs:DescribeTasks"]
    resources = ["${replace(var.manager_ecs_cluster_arn, ":cluster/", ":task/")}/*"]
  }

  statement {
    sid       = "PassRolesToTasks"
    actions   = ["iam:PassRole"]
    resources = concat([aws_iam_role.worker_execution.arn], local.worker_task_role_arns)

    condition {
      test     = "StringEquals"
      variable = "iam:PassedToService"
      values   = ["ecs-tasks.amazonaws.com"]
    }
  }
}

# What ECS does to start a manager.

resource "aws_iam_role" "manager_execution" {
  name                 = "${local.name}-exec"
  assume_role_policy   = data.aws_iam_policy_document.tasks_trust.json
  permissions_boundary = local.permissions_boundary
  tags                 = var.tags_common
}

resource "aws_iam_role_policy" "manager_execution" {
  name   = "manager-execution"
  role   = aws_iam_role.manager_execution.id
  policy = data.aws_iam_policy_document.manager_execution.json
}

data "aws_kms_key" "secrets" {
  count = var.secrets_kms_key == "" ? 0 : 1

  key_id = var.secrets_kms_key
}

data "aws_iam_policy_document" "manager_execution" {
  dynamic "statement" {
    for_each = length(local.manager_repository_arns) > 0 ? [true] : []

    content {
      sid       = "LogInToRegistry"
      actions   = ["ecr:GetAuthorizationToken"]
      resources = ["*"]
    }
  }

  dynamic "statement" {
    for_each = length(local.manager_repository_arns) > 0 ? [true] : []

    content {
      sid       = "PullManagerImage"
      actions   = ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
      resources = local.manager_repository_arns
    }
  }

  statement {
    sid       = "WriteLogs"
    actions   = ["logs:CreateLogStream", "logs:PutLogEvents"]
    resources = ["${aws_cloudwatch_log_group.manager.arn}:*"]
  }

  dynamic "statement" {
    for_each = anytrue([for arn in local.token_secret_arns : strcontains(arn, ":secretsmanager:")]) ? [true] : []

    content {
      sid       = "ReadTokensInSecretsManager"
      actions   = ["secretsmanager:GetSecretValue"]
      resources = [for arn in local.token_secret_arns : arn if strcontains(arn, ":secretsmanager:")]
    }
  }

  dynamic "statement" {
    for_each = anytrue([for arn in local.token_secret_arns : strcontains(arn, ":ssm:")]) ? [true] : []

    content {
      sid       = "ReadTokensInParameterStore"
      actions   = ["ssm:GetParameters"]
      resources = [for arn in local.token_secret_arns : arn if strcontains(arn, ":ssm:")]
    }
  }

  dynamic "statement" {
    for_each = data.aws_kms_key.secrets

    content {
      sid       = "DecryptTokens"
      actions   = ["kms:Decrypt"]
      resources = [statement.value.arn]

      condition {
        test     = "StringLike"
        variable = "kms:ViaService"
        values   = ["secretsmanager.${local.region}.amazonaws.com*", "ssm.${local.region}.amazonaws.com*"]
      }
    }
  }
}
