import pytest
from accelerate.state import AcceleratorState, GradientState
from encoder_models import save_colors, save_tiny_bert


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny encoder and a data set that it can learn."""
    home = tmp_path_factory.mktemp("home")
    save_tiny_bert(home / "bert")
    save_colors(home / "colors")
    return home


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """accelerate keeps its precision for the whole process: a test that trained in bfloat16 must not change the next one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
