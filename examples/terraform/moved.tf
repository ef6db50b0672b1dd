# For the state of the module that this one replaces: these keep their names, so they are changed in place. In a new
# state, the blocks have no effect.

moved {
  from = module.manager_service.aws_ecs_service.default[0]
  to   = aws_ecs_service.manager
}

moved {
  from = module.manager_service.aws_iam_role.ecs_task[0]
  to   = aws_iam_role.manager
}

moved {
  from = module.manager_service.aws_iam_role.ecs_exec[0]
  to   = aws_iam_role.manager_execution
}

moved {
  from = aws_iam_role.worker_execution_role
  to   = aws_iam_role.worker_execution
}
