"""The schema, the yaml files that fill it, and the checks on what they say."""
