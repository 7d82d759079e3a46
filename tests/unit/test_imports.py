"""Who may import whom, held by reading the sources: model ← cluster ← serve_app; where torch, Ray and pandas stay."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("model", "cluster", "serve_app")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PANDAS = ("model/frames.py", "model/calendars.py", "model/predictor.py", "cluster/")


def imported(path, *, top_level_only=False):
    """Full names of the modules that a file imports; with top_level_only, those imported when it is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if top_level_only:
        nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    else:
        nodes = list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who is meant"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def uses(path, *packages, **options):
    return sorted(name for name in imported(path, **options) if name.split(".")[0] in packages)


def relative(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_layers(path):
    package = relative(path).split("/")[0]
    if package == "model":
        assert not uses(path, "cluster", "serve_app", "ray", "fastapi", "starlette", "httpx", "uvicorn")
    elif package == "cluster":
        assert not uses(path, "serve_app", "fastapi", "starlette")
    else:
        from_cluster = uses(path, "cluster")
        assert all(name == "cluster.plan" or name.startswith("cluster.plan.") for name in from_cluster)
    assert not uses(path, "tests")


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_pandas_stays_where_the_rules_for_frames_are(path):
    if not relative(path).startswith(PANDAS):
        assert not uses(path, "pandas")


def reached(module, packages=PACKAGES):
    """Every module of ours that importing `module` imports, itself included."""
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        path = ROOT / (name.replace(".", "/") + ".py")
        if name in seen or not path.is_file():
            continue
        seen.add(name)
        todo += uses(path, *packages, top_level_only=True)
    return seen


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("serve_app.schemas", {"ray", "torch"}),
        ("serve_app.client", {"ray", "torch", "pandas", "numpy"}),
        ("serve_app.ingress", {"ray", "torch"}),
        ("serve_app.jobs", {"ray", "torch", "pandas", "fastapi"}),
        ("serve_app.config", {"ray", "torch", "pandas", "fastapi"}),
        ("serve_app.app", {"torch"}),
        ("cluster.plan", {"ray", "torch"}),
        ("model.engine.scheduler", {"torch", "pandas"}),
        ("model.engine.types", {"torch", "pandas"}),
    ],
)
def test_what_importing_a_module_brings_along(module, forbidden):
    modules = reached(module)
    assert module in modules
    for name in modules:
        path = ROOT / (name.replace(".", "/") + ".py")
        assert not uses(path, *forbidden, top_level_only=True), name


def test_torch_lives_in_one_file_of_the_service():
    assert [relative(p) for p in SOURCES if relative(p).startswith("serve_app/") and uses(p, "torch")] == [
        "serve_app/engine.py"
    ]
