"""IAM's decision about a call, as far as the policies of the infrastructure files need it."""

import fnmatch


def as_list(value):
    return value if isinstance(value, list) else [value]


def is_allowed(statements, action, resource, context):
    """Whether one of `statements` allows the call. `context` has the values of condition keys."""

    def applies(statement):
        conditions = statement.get("Condition", {})
        assert set(conditions) <= {"ArnEquals", "StringEquals"}
        assert statement["Effect"] == "Allow"
        return (
            any(fnmatch.fnmatchcase(action, pattern) for pattern in as_list(statement["Action"]))
            and any(fnmatch.fnmatchcase(resource, pattern) for pattern in as_list(statement["Resource"]))
            and all(context.get(key) in as_list(value) for test in conditions.values() for key, value in test.items())
        )

    return any(applies(statement) for statement in statements)
