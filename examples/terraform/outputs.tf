output "manager_service_name" {
  description = "Name of the ECS service of the managers."
  value       = aws_ecs_service.manager.name
}

output "worker_task_definition_arns" {
  description = "ARNs of the workers' task definitions, by the manager's name."
  value       = { for name, definition in aws_ecs_task_definition.worker : name => definition.arn }
}

output "manager_task_role_arn" {
  description = "ARN of the managers' task role, for policies of other resources."
  value       = aws_iam_role.manager.arn
}

output "worker_execution_role_arn" {
  description = "ARN of the workers' execution role, such as for policies of repositories in other accounts."
  value       = aws_iam_role.worker_execution.arn
}

output "log_group_names" {
  description = "Names of the log groups of the managers and of the workers."
  value = {
    manager = aws_cloudwatch_log_group.manager.name
    worker  = aws_cloudwatch_log_group.worker.name
  }
}
