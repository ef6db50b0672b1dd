"""Reads a CloudFormation template, and resolves its intrinsic functions as CloudFormation does."""

import re

from cfnlint.decode import decode

ABSENT = object()  # AWS::NoValue


def load(path):
    """The template, with intrinsic functions in their long form, such as {"Ref": "VpcId"}."""
    template, problems = decode(str(path))
    assert not problems, problems
    return plain(template)


def plain(value):
    """A copy without cfn-lint's classes, which know the lines of the file."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, str) else value


class Resolver:
    """Resolves intrinsic functions with the values of parameters, and the attributes of resources.

    `attributes` has, for each logical id, the attributes by their names for Fn::GetAtt; "Ref" is what Ref returns. It
    may be filled while resources are created. An unknown name is an error, as is a function that is not supported.
    """

    def __init__(self, template, parameters, pseudo):
        self.template = template
        self.pseudo = pseudo
        self.attributes = {}
        unknown = set(parameters) - set(template["Parameters"])
        assert not unknown, f"the template has no parameters {unknown}"
        self.parameters = {}
        for name, declared in template["Parameters"].items():
            value = parameters.get(name, declared.get("Default", ABSENT))
            assert value is not ABSENT, f"the parameter {name} needs a value"
            self.parameters[name] = self._checked(name, declared, str(value))

    @staticmethod
    def _checked(name, declared, text):
        is_list = declared["Type"] == "CommaDelimitedList" or declared["Type"].startswith("List<")
        values = [part.strip() for part in text.split(",")] if is_list else [text]
        for value in values:
            pattern = declared.get("AllowedPattern")
            assert pattern is None or re.fullmatch(pattern, value), f"{name}: {value!r} does not match {pattern}"
            allowed = declared.get("AllowedValues")
            assert allowed is None or value in map(str, allowed), f"{name}: {value!r} is not one of {allowed}"
            if declared["Type"] == "Number":
                low, high = declared.get("MinValue", 0), declared.get("MaxValue", float("inf"))
                assert low <= int(value) <= high, f"{name}: {value} is not between {low} and {high}"
        return values if is_list else text

    def reference(self, name):
        if name in self.parameters:
            return self.parameters[name]
        if name == "AWS::NoValue":
            return ABSENT
        return self.pseudo[name] if name.startswith("AWS::") else self.attribute(name, "Ref")

    def attribute(self, logical_id, name):
        assert logical_id in self.template["Resources"], f"there is no resource {logical_id}"
        return self.attributes[logical_id][name]

    def condition(self, name):
        return self.test(self.template["Conditions"][name])

    def test(self, expression):
        [(function, value)] = expression.items()
        if function == "Condition":
            return self.condition(value)
        if function == "Fn::Equals":
            left, right = (self.resolve(side) for side in value)
            return str(left) == str(right)
        if function == "Fn::Contains":
            values, wanted = (self.resolve(side) for side in value)
            return str(wanted) in map(str, values)
        if function == "Fn::EachMemberEquals":
            values, wanted = (self.resolve(side) for side in value)
            return all(str(item) == str(wanted) for item in values)
        combine = {"Fn::Not": lambda results: not results[0], "Fn::And": all, "Fn::Or": any}[function]
        return combine([self.test(inner) for inner in value])

    def broken_rules(self):
        """The descriptions of the assertions in Rules that the parameters do not meet."""
        return [
            assertion["AssertDescription"]
            for rule in self.template["Rules"].values()
            if "RuleCondition" not in rule or self.test(rule["RuleCondition"])
            for assertion in rule["Assertions"]
            if not self.test(assertion["Assert"])
        ]

    def resolve(self, value):
        if isinstance(value, list):
            return [item for item in map(self.resolve, value) if item is not ABSENT]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            [(function, argument)] = value.items()
            if function == "Ref" or function.startswith("Fn::"):
                return getattr(self, function.replace("::", "_").lower())(argument)
        resolved = {key: self.resolve(item) for key, item in value.items()}
        return {key: item for key, item in resolved.items() if item is not ABSENT}

    def ref(self, name):
        return self.reference(name)

    def fn_getatt(self, path):
        logical_id, name = path.split(".", 1) if isinstance(path, str) else path
        return self.attribute(logical_id, name)

    def fn_join(self, argument):
        separator, parts = argument
        return separator.join(map(str, self.resolve(parts)))

    def fn_split(self, argument):
        separator, text = argument
        return self.resolve(text).split(separator)

    def fn_select(self, argument):
        index, parts = argument
        return self.resolve(parts)[int(index)]

    def fn_if(self, argument):
        name, when_true, when_false = argument
        return self.resolve(when_true if self.condition(name) else when_false)

    def fn_findinmap(self, argument):
        name, first, second = map(self.resolve, argument)
        return self.template["Mappings"][name][first][second]

    def fn_sub(self, argument):
        text, names = (argument, {}) if isinstance(argument, str) else argument

        def substitute(match):
            name = match[1]
            if name in names:
                value = self.resolve(names[name])
            else:
                value = self.fn_getatt(name) if "." in name else self.reference(name)
            assert isinstance(value, (str, int)), f"{name} of {text} is no text: {value!r}"
            return str(value)

        return re.sub(r"\$\{([\w:.]+)\}", substitute, text)

    def properties(self, logical_id):
        return self.resolve(self.template["Resources"][logical_id].get("Properties", {}))

    def is_created(self, logical_id):
        condition = self.template["Resources"][logical_id].get("Condition")
        return condition is None or self.condition(condition)


def to_request(shape, value, path=""):
    """Converts properties of a resource to the input of an API: its spelling of names, and its types.

    `shape` is botocore's description of the input. A property that the API does not know is an error.
    """
    if shape.type_name == "structure":
        names = {name.lower(): name for name in shape.members}
        converted = {}
        for key, item in value.items():
            name = names.get(key.lower())
            assert name, f"{path}: {shape.name} knows no {key}"
            converted[name] = to_request(shape.members[name], item, f"{path}.{name}")
        return converted
    if shape.type_name == "list":
        return [to_request(shape.member, item, f"{path}[]") for item in value]
    if shape.type_name == "map":
        return {key: to_request(shape.value, item, f"{path}.{key}") for key, item in value.items()}
    if shape.type_name == "boolean":
        assert isinstance(value, bool), f"{path}: {value!r} is not true or false"
        return value
    if shape.type_name in ("integer", "long"):
        return int(value)
    assert not isinstance(value, bool), f"{path}: {value!r} is not a text"
    text = str(value)
    assert not shape.enum or text in shape.enum, f"{path}: {text} is not one of {shape.enum}"
    return text


class Symbols(Resolver):
    """Resolves a template without creating anything: an attribute of a resource is its name, such as Cluster.Arn."""

    def attribute(self, logical_id, name):
        assert logical_id in self.template["Resources"], f"there is no resource {logical_id}"
        return logical_id if name == "Ref" else f"{logical_id}.{name}"

    def values(self):
        """All values of properties, by their path. Items of a list are named by what identifies them."""
        found = {}

        def add(path, value):
            if isinstance(value, dict):
                for key, item in value.items():
                    add(f"{path}.{key}", item)
            elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
                for number, item in enumerate(value):
                    names = [item[key] for key in ("Name", "PolicyName", "Sid", "CapacityProvider") if key in item]
                    add(f"{path}[{names[0] if names else number}]", item)
            else:
                found[path] = value

        for logical_id in self.template["Resources"]:
            if self.is_created(logical_id):
                add(logical_id, self.properties(logical_id))
        return found
