from gpu_fixtures import poisoned  # noqa: F401 (a fixture of all tests of this folder)
