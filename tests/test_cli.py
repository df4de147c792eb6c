"""The demo's measuring, drawing and wiring, on stand-ins; the real demo is marked slow."""

import ast
import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

import specdiff
from specdiff import cli, picture, summary
from specdiff.comparison import Comparison, Method, Request, compare, count_images, psnr, ssim
from specdiff.demo import load_pipeline
from specdiff.errors import OptionError
from specdiff.inspect import target
from specdiff.methods import (
    Setting,
    compiled_pipeline,
    demo_methods,
    demo_requests,
    embed,
    picture_maker,
)
from specdiff.options import NO_LONGER, OPTIONS, Options
from specdiff.plan import Plan
from specdiff.runtime.tokens.schedule import Place, Schedule

SIDE = 32
REQUESTS = [Request("a red apple", 0), Request("a black cat that sits among many [brackets]", 1)]


@dataclass
class FakeRuntime:
    """Counts as the runtime would: half of 16 tokens at each of four steps."""

    tokens_computed: int = 0
    tokens_total: int = 0
    cache_bytes: int = 3 * 2**20
    compile_seconds: Mapping[str, float] = field(default_factory=lambda: {"dense": 1.5})
    fallbacks: Mapping[str, int] = field(default_factory=lambda: {"a NaN": 2})
    token_counts: Tensor | None = None

    def run(self) -> None:
        self.tokens_computed += 32
        self.tokens_total += 64
        self.token_counts = torch.arange(16).view(1, 16) % 5


def noise_picture(request: Request) -> Tensor:
    generator = torch.Generator().manual_seed(request.seed)
    return torch.rand(SIDE, SIDE, 3, generator=generator)


def selective(name: str, error: float, options: Mapping[str, object]) -> Method:
    runtime = FakeRuntime()

    def generate(request: Request) -> Tensor:
        runtime.run()
        return (noise_picture(request) + error).clamp(0, 1)

    return Method(name, 4, generate, lambda: runtime, options)


def stand_ins() -> list[Method]:
    return [
        Method("dense", 4, noise_picture),
        selective("specdiff", 0.01, {"cache_ratio": 0.5}),
        selective("paper", 0.1, {"cache_ratio": 0.5, "method": "paper"}),
        Method("dense, 2 steps", 2, noise_picture, compiles=False),
    ]


@pytest.fixture(name="comparison")
def _comparison() -> Comparison:
    return compare(stand_ins(), REQUESTS, repeats=2)


def test_psnr_of_a_known_error() -> None:
    reference = torch.full((SIDE, SIDE, 3), 0.5)
    assert psnr(reference + 0.1, reference) == pytest.approx(20, abs=1e-4)
    assert psnr(reference, reference) == math.inf


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise() -> None:
    reference = noise_picture(REQUESTS[0])
    noisy = reference + 0.2 * torch.randn(reference.shape)
    assert ssim(reference, reference) == pytest.approx(1)
    assert ssim(noisy, reference) < 0.95


def test_pictures_of_different_shapes_are_refused() -> None:
    cropped = Method("cropped", 4, lambda request: noise_picture(request)[1:])
    with pytest.raises(ValueError, match="cannot compare"):
        compare([*stand_ins(), cropped], REQUESTS, repeats=1)


def test_methods_take_turns_after_the_warm_up() -> None:
    made: list[str] = []

    def recorder(name: str) -> Callable[[Request], Tensor]:
        def generate(request: Request) -> Tensor:
            made.append(f"{name}{request.seed}")
            return noise_picture(request)

        return generate

    methods = [Method(name, 4, recorder(name)) for name in "ab"]
    told: list[str] = []
    compare(methods, REQUESTS, 2, told.append)
    assert made == ["a0", "b0", *["a0", "b0", "a1", "b1"] * 2]
    assert len(told) == len(made) == count_images(methods, REQUESTS, 2)


def test_token_shares_are_relative_to_the_reference(comparison: Comparison) -> None:
    assert [comparison.tokens_share(one) for one in comparison.trials] == [1, 0.5, 0.5, 0.5]


def test_qualities_are_ordered_as_the_errors_are(comparison: Comparison) -> None:
    dense, default, paper, shorter = comparison.trials
    assert dense.psnr == shorter.psnr == math.inf
    assert math.inf > default.psnr > 35 > paper.psnr


def test_record_is_strict_json_with_all_methods(comparison: Comparison) -> None:
    text = json.dumps(summary.record(comparison, torch.device("cpu"), 2, 0.1), allow_nan=False)
    figures = json.loads(text)
    assert figures["environment"]["torch"] == torch.__version__
    assert {"date", "device", "processor", "cores"} <= figures["environment"].keys()
    names = [method["name"] for method in figures["methods"]]
    assert names == ["dense", "specdiff", "paper", "dense, 2 steps"]
    dense, default, paper, _ = figures["methods"]
    assert dense["psnr_db"] is None and default["psnr_db"] > paper["psnr_db"]
    assert paper["options"] == {"cache_ratio": 0.5, "method": "paper"}
    assert default["program_seconds"] == {"dense": 1.5}
    assert [len(one["seconds"]) for one in default["pictures"]] == [2, 2]


def test_plans_are_recorded_as_their_files_are() -> None:
    options = {"plan": Plan.tapered(3), "cache_ratio": 0.9, "dump_dir": Path("x"), "quality": None}
    rule = {"specdiff_plan": 1, "rule": {"tapered": 3}}
    assert summary.plain(options) == {"plan": rule, "cache_ratio": 0.9, "dump_dir": "x"}


def test_table_names_every_method(comparison: Comparison) -> None:
    with cli.console.capture() as captured:
        cli.console.print(summary.table(comparison))
    printed = captured.get()
    for words in ("dense", "specdiff", "paper", "dense, 2 steps", "3.0 MiB", "50%"):
        assert words in printed


def test_steps_that_ran_dense_and_a_busy_machine_are_told(comparison: Comparison) -> None:
    told = [f"{name}: 2 steps ran dense: a NaN" for name in ("specdiff", "paper")]
    assert summary.warnings(comparison, load=0.1) == told
    assert "do not trust the times" in summary.warnings(comparison, load=3.0)[-1]


def test_picture_is_a_png_of_sane_size(comparison: Comparison, tmp_path: Path) -> None:
    file = tmp_path / "demo.png"
    picture.draw_comparison(comparison, file)
    with Image.open(file) as opened:
        assert opened.format == "PNG"
        assert 1000 < opened.width < 4000
        assert 300 < opened.height < 2000


def test_difference_is_white_where_nothing_changed() -> None:
    reference = torch.full((SIDE, SIDE, 3), 0.5)
    changed = reference.clone()
    changed[0, 0] += 0.1
    shown = picture.difference(changed, reference)
    assert shown[0, 0, 0].item() == pytest.approx(1 - 0.1 * picture.AMPLIFICATION)
    assert (shown[1:] == 1).all()


def test_token_map_has_the_shape_of_the_picture() -> None:
    counts = torch.arange(32)
    assert picture.token_map(counts, 64, 128).shape == (4, 8)
    assert picture.token_map(counts.expand(3, 32), 128, 64).shape == (8, 4)
    with pytest.raises(ValueError, match="do not fill"):
        picture.token_map(torch.arange(7), 64, 128)


def test_options_are_read_as_literals_or_text() -> None:
    options = cli.parse_options(["cache_ratio=0.9", "method=paper"])
    assert options == {"cache_ratio": 0.9, "method": "paper"}


@pytest.mark.parametrize(
    "pair", ["cache_ration=0.9", "cache_ratio", "cache_ratio=many", "mode=nosuch"]
)
def test_wrong_options_are_refused(pair: str) -> None:
    with pytest.raises(OptionError, match=r"cache_ratio|mode='nosuch': must be one of 'default'"):
        cli.parse_options([pair])


def test_settings_of_inductor_are_options_of_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    options = cli.parse_options(["epilogue_fusion=False", "cache_ratio=0.5"])
    seen: list[Mapping[str, object]] = []

    def compiled(setting: Setting, backend: str, options: Mapping[str, object]) -> SimpleNamespace:
        seen.append(options)
        return SimpleNamespace(transformer=None)

    monkeypatch.setattr("specdiff.methods.compiled_pipeline", compiled)
    demo_methods(Setting(torch.device("cpu"), 4, options, {}))
    assert seen == [{"epilogue_fusion": False}, options, {**options, "method": "paper"}]


OPTIONS_PAGE = (Path(__file__).parents[1] / "docs" / "options.md").read_text(encoding="utf-8")


def test_the_page_explains_every_option() -> None:
    explained = [line.split("`")[1] for line in OPTIONS_PAGE.splitlines() if line[:3] == "| `"]
    current = [name for name in explained if "=" not in name and name not in NO_LONGER]
    assert current == list(OPTIONS)


def test_the_page_states_the_defaults() -> None:
    fixed = {option.name: option.default for option in dataclasses.fields(Options)}
    resolved = [dataclasses.asdict(Options(method=m).resolve()) for m in ("history", "paper")]
    stated = set()
    for line in OPTIONS_PAGE.splitlines():
        if not line.startswith("| `") or " Default: " not in line:
            continue
        name, said = line.split("`")[1], line.rpartition(" Default: ")[2].rstrip(" |")
        usual, _, paper = said.partition('; `"paper"`: ')
        expected = [found.get(name, fixed[name]) for found in resolved]
        assert [ast.literal_eval(text.strip("`")) for text in (usual, paper or usual)] == expected
        stated.add(name)
    left_out = {name for name, default in fixed.items() if default is None}
    assert stated >= {"cache_ratio", "method", "forecast", "text_steps"}
    assert stated >= set(OPTIONS) - left_out


def test_the_page_says_what_became_of_the_options_of_old() -> None:
    table = OPTIONS_PAGE.split("## Options of earlier versions")[1]
    assert all(f"`{name}" in table for name in NO_LONGER)


def test_the_plans_of_the_page_are_plans() -> None:
    blocks = OPTIONS_PAGE.split("```json\n")[1:]
    plans = [Options(plan=json.loads(block.split("```")[0])).plan for block in blocks]
    assert plans[0] == Plan.tapered(4, cache_ratio=0.9) and len(plans) == 2
    for kind, number in (("tapered", 4), ("every", 4), ("warmup", 3)):
        plan, call = getattr(Plan, kind)(number), f"{kind}({number})"
        schedule = Schedule.of(Options(plan=plan).resolve(), (16,))
        counts = [schedule.decide(Place.known(index, 28))[0] for index in range(28)]
        drawn = "".join("D" if count else "-" for count in counts)
        assert re.search(rf"specdiff\.Plan\.{re.escape(call)} +# {drawn}", OPTIONS_PAGE), drawn


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command as a shell would and return its exit status."""
    monkeypatch.setattr("sys.argv", ["specdiff", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_version_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == specdiff.__version__ == version("specdiff")


def test_a_wrong_option_stops_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "demo", "--option", "cache_ration=0.9") == 2
    assert "cache_ratio" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_stops_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    blocking = tmp_path / "file"
    blocking.touch()
    assert run_cli(monkeypatch, "demo", "--out", str(blocking / "demo.png")) == 2
    assert "cannot write" in capsys.readouterr().err
    assert run_cli(monkeypatch, "demo", "--json", str(tmp_path)) == 2
    assert "is a folder" in capsys.readouterr().err
    if Path("/proc").is_dir():  # where even root makes no file
        assert run_cli(monkeypatch, "explain", "demo", "--html", "/proc/page.html") == 2
        assert "cannot write /proc/page.html" in capsys.readouterr().err


def test_files_that_can_be_written_are_left_as_they_are(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "folder" / "new"
    old.write_text("kept")
    cli.make_folders([old, new])
    assert old.read_text() == "kept"
    assert new.parent.is_dir() and not new.exists()


def test_demo_writes_picture_and_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("specdiff.methods.demo_methods", lambda setting, fewer: stand_ins())
    monkeypatch.setattr("specdiff.methods.embed", lambda requests, device: {})
    out, figures = tmp_path / "new" / "demo.png", tmp_path / "demo.json"
    files = ["--out", str(out), "--json", str(figures)]
    assert run_cli(monkeypatch, "demo", "a red apple", "a cat", "--repeats", "1", *files) == 0
    assert out.stat().st_size > 0
    pictures = json.loads(figures.read_text())["methods"][0]["pictures"]
    assert [one["prompt"] for one in pictures] == ["a red apple", "a cat"]


MODEL = """
from tests.models import flux

def build():
    return flux(1, 0, rows=4, columns=5, batch=1)

def wrong():
    return flux

def unfit():
    model, inputs = build()
    return model, {"hidden_states": inputs["hidden_states"]}

def misshapen():
    model, inputs = build()
    return model, {**inputs, "hidden_states": inputs["hidden_states"][..., :3]}
"""


@pytest.fixture(name="model_file")
def _model_file(tmp_path: Path) -> Path:
    file = tmp_path / "model.py"
    file.write_text(MODEL)
    return file


def test_explain_writes_page_and_figures(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model_file: Path,
) -> None:
    page, figures = tmp_path / "new" / "page.html", tmp_path / "figures.json"
    files = ["--html", str(page), "--json", str(figures), "--option", "cache_ratio=0.5"]
    assert run_cli(monkeypatch, "explain", f"{model_file}:build", "--steps", "9", *files) == 0
    assert "encoder_hidden_states" in capsys.readouterr().out
    assert "FluxTransformer2DModel" in page.read_text()
    found = json.loads(figures.read_text())
    assert found["sizes"] == {"B": 1, "N": 20, "T": 4}
    assert len(found["schedule"]) == 9
    assert found["prediction"]["dense"] > found["prediction"]["selective"] > 0


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("model", "expected demo, package.module:function or file.py:function"),
        ("no_such_module:build", "cannot import no_such_module"),
        ("no_such_file.py:build", "cannot import no_such_file.py"),
        ("FILE:absent", "has no function absent"),
        ("FILE:wrong", "must return a model and a dict of its inputs"),
        ("json:dumps", "must be a function that needs no arguments"),
        ("FILE:unfit", "FluxTransformer2DModel does not run on its inputs: "),
        ("FILE:misshapen", "FluxTransformer2DModel does not run on its inputs: RuntimeError: mat1"),
    ],
)
def test_explain_names_what_is_wrong_with_a_target(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_file: Path,
    named: str,
    message: str,
) -> None:
    assert run_cli(monkeypatch, "explain", named.replace("FILE", str(model_file))) == 2
    assert message in capsys.readouterr().err


def test_demo_writes_a_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_file: Path
) -> None:
    call = target.load_target(f"{model_file}:build", torch.device("cpu"))
    monkeypatch.setattr("specdiff.inspect.target.demo_call", lambda device: call)
    monkeypatch.setattr("specdiff.methods.demo_methods", lambda setting, fewer: stand_ins())
    monkeypatch.setattr("specdiff.methods.embed", lambda requests, device: {})
    page = tmp_path / "new" / "page.html"
    files = ["--out", str(tmp_path / "demo.png"), "--report", str(page)]
    assert run_cli(monkeypatch, "demo", "a red apple", "--repeats", "1", *files) == 0
    assert "a red apple" in page.read_text()


def test_the_demo_model_keeps_what_the_readme_says() -> None:
    """One picture by the defaults, in CI; the whole demo is below."""
    place, requests = torch.device("cpu"), demo_requests([], 0)[:1]
    setting = Setting(place, 28, {}, embed(requests, place))
    pipelines = load_pipeline(place), compiled_pipeline(setting, backend="specdiff")
    dense, default = (picture_maker(one, setting, 28)(requests[0]) for one in pipelines)
    fidelity = psnr(default, dense)
    assert 38 < fidelity < 60  # 40.9 measured; more would be a model that skips nothing


@pytest.mark.slow
def test_real_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, file = tmp_path / "demo.png", tmp_path / "demo.json"
    page = tmp_path / "demo.html"
    files = ["--out", str(out), "--json", str(file), "--report", str(page)]
    assert run_cli(monkeypatch, "demo", "--repeats", "1", "--fewer-steps", "14", *files) == 0
    assert page.read_text().count('class="viewer"') == 2 * len(
        json.loads(file.read_text())["methods"][0]["pictures"]
    )
    figures = json.loads(file.read_text())
    dense, default, paper, shorter = figures["methods"]
    assert dense["tokens_share"] == 1
    # 3 dB below what was measured on these prompts
    for method, tokens, fidelity in ((default, 0.4, 39), (paper, 0.3, 21)):
        assert 0 < method["tokens_share"] < tokens
        assert method["psnr_db"] > fidelity
    assert default["cache_bytes"] == 0 < paper["cache_bytes"]  # the default computes no part
    assert shorter["steps"] == 14
    assert out.stat().st_size > 10_000
