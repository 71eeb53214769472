"""Promises of shared models: their cards, and pushing to and predicting from the Hub (a stand-in that speaks HTTP)."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest
import yaml

import bushpc
from bushpc.cli import main
from bushpc.errors import DataError
from bushpc.report.scope import scope_of_run
from bushpc.report.summary import summarise
from bushpc.shards.manifest import Manifest, read_image
from tests.hub import TOKEN, Hub, card_errors

pytestmark = pytest.mark.filterwarnings("ignore::bushpc.errors.BushpcWarning")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    # The stand-in takes large files by LFS, as the Hub does from clients without hf_xet.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "model"
    assert main(["export", str(trained.run), str(out), "--licence", "cc-by-4.0"]) == 0
    return out


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def relicensed(trained, folder: Path, licence: str) -> Path:
    """A copy of the run whose dataset has this licence."""
    shutil.copytree(trained.run, folder / "run")
    shutil.copytree(trained.shards, folder / "shards")
    card = folder / "shards" / "card.yaml"
    content = yaml.safe_load(card.read_text()) if card.exists() else _card_of_the_phantom()
    card.write_text(yaml.safe_dump({**content, "licence": licence}))
    for config in (folder / "run" / "cells").glob("*/config.yaml"):
        config.write_text(config.read_text().replace(str(trained.shards), str(folder / "shards")))
    return folder / "run"


def _card_of_the_phantom() -> dict:
    from bushpc.shards.card import PROJECT_SHARDS

    return yaml.safe_load((PROJECT_SHARDS / "phantom" / "card.yaml").read_text())


def test_the_card_is_one_that_the_hub_accepts_and_its_library_reads_back(exported):
    from huggingface_hub import ModelCard

    text = (exported / "README.md").read_text()
    assert card_errors(text) == []
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.datasets) == ("cc-by-4.0", "bushpc", ["phantom"])
    assert "dice" in data.metrics
    assert {result.metric_type for result in data.eval_results} == set(data.metrics)


def test_the_cards_figures_are_those_of_the_report_with_interval_grid_and_folds(exported, trained):
    """The report of the whole run also knows folds that were never trained, so its figures are called partial."""
    (arm,) = summarise(scope_of_run(trained.run)).arms
    results = front_matter(exported)["model-index"][0]["results"]
    by_source = {
        result["dataset"]["config"]: result["metrics"] for result in results if "seg" in result["task"]["type"]
    }
    assert by_source.keys() == {name for name, source in arm.sources.items() if not source.uses_ground_truth}
    for source, metrics in by_source.items():
        (dice,) = [metric for metric in metrics if metric["type"] == "dice"]
        reported = arm.metrics[source]["dice"]
        assert dice["value"] == reported.partial_mean
        assert dice["args"]["sd_over_folds"] == pytest.approx(statistics.stdev(reported.per_fold.values()))
        assert dice["args"]["folds"] == [0, 1]
        assert "64 x 64" in dice["args"]["grid"]
        if reported.bounds:
            assert tuple(dice["args"]["ci95"]) == reported.bounds


def test_a_push_holds_the_export_and_predicts_the_same_from_the_hub(hub, exported, trained, tmp_path, capsys):
    run, out = str(trained.run), tmp_path / "model"
    command = ["export", run, str(out), "--licence", "cc-by-4.0", "--push", "lab/xbusnet"]
    assert main(command) == 0
    assert "predict hub:lab/xbusnet" in capsys.readouterr().out
    assert hub.repositories["lab/xbusnet"].private
    assert hub.files("lab/xbusnet") == {
        path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }
    commits = len(hub.repositories["lab/xbusnet"].commits)
    assert main(command) == 0
    assert len(hub.repositories["lab/xbusnet"].commits) == commits, "nothing changed, so there is no commit"
    image = read_image(trained.shards, Manifest.load(trained.shards).lesions[0])
    there, here = bushpc.load("hub:lab/xbusnet")(image), bushpc.load(exported)(image)
    assert (there.prob_HW == here.prob_HW).all()
    hub.close()
    assert bushpc.load("hub:lab/xbusnet", fold=1).members[0].name == "fold1", "it was kept, and needs no network"


def test_one_fold_fetches_one_fold_and_a_revision_is_kept_to(hub, trained, tmp_path):
    words = ["export", str(trained.run), "--licence", "mit", "--push", "lab/toy"]
    assert main([*words, str(tmp_path / "both")]) == 0
    first = hub.repositories["lab/toy"].commits[-1][0]
    assert main([*words, str(tmp_path / "one"), "--fold", "0"]) == 0
    assert not any(name.startswith("fold1/") for name in hub.files("lab/toy")), "weights of the earlier export"
    assert [member.name for member in bushpc.load("hub:lab/toy").members] == ["fold0"]
    hub.requests.clear()
    assert [member.name for member in bushpc.load(f"hub:lab/toy@{first}", fold=1).members] == ["fold1"]
    assert not any("fold0/model.safetensors" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push", "xbusnet", "--licence", "mit"], "must be OWNER/NAME"),
        (["--push", "lab/a b", "--licence", "mit"], "lab/a b"),
        (["--push", "lab/xbusnet"], "needs --licence"),
        (["--push", "lab/xbusnet", "--licence", "mitt"], "did you mean 'mit'"),
        (["--push", "others/xbusnet", "--licence", "mit"], "you are not a member of others; allowed are ada, lab"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_written(hub, trained, tmp_path, capsys, words, message):
    assert main(["export", str(trained.run), str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not hub.repositories


def test_who_is_not_logged_in_is_told_how_to(hub, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert main(["export", str(trained.run), str(tmp_path / "out"), "--push", "lab/a", "--licence", "mit"]) == 2
    assert "hf auth login" in capsys.readouterr().err


def test_a_repository_of_something_else_is_left_alone(hub, trained, tmp_path, capsys):
    from tests.hub import Repository

    hub.repositories["lab/notes"] = Repository(private=False)
    hub.repositories["lab/notes"].commit({"thesis.tex": b"..."})
    assert main(["export", str(trained.run), str(tmp_path / "out"), "--push", "lab/notes", "--licence", "mit"]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert hub.files("lab/notes") == {"thesis.tex": b"..."}
    with pytest.raises(DataError, match=r"has no export\.json"):
        bushpc.load("hub:lab/notes")


@pytest.mark.parametrize("address", ["hub:lab/none", "hub:lab/toy@nowhere"])
def test_what_is_not_on_the_hub_is_named(hub, address):
    from tests.hub import Repository

    hub.repositories["lab/toy"] = Repository(private=False)
    with pytest.raises(DataError, match=f"{address} cannot be fetched"):
        bushpc.load(address)


def test_without_a_network_it_says_what_to_do(hub):
    hub.close()
    with pytest.raises(DataError, match="run this once on a machine that has it"):
        bushpc.load("hub:lab/toy")


def test_a_licence_that_contradicts_the_datas_is_named_on_the_card_and_not_pushed(hub, trained, tmp_path, capsys):
    run, out = relicensed(trained, tmp_path, "CC BY-NC 4.0"), tmp_path / "out"
    words = ["export", str(run), str(out), "--fold", "0"]
    assert main([*words, "--licence", "mit", "--push", "lab/toy"]) == 2
    assert "requires non-commercial, which mit doesn't keep: choose cc-by-nc-4.0" in capsys.readouterr().err
    assert not out.exists()
    assert main([*words, "--licence", "mit"]) == 0
    assert "licence conflict" in capsys.readouterr().err
    assert "**Conflict:**" in (out / "README.md").read_text()
    shutil.rmtree(out)
    assert main([*words, "--licence", "cc-by-nc-4.0", "--push", "lab/toy"]) == 0
    assert "**Conflict:**" not in (out / "README.md").read_text()
    assert front_matter(out)["license"] == "cc-by-nc-4.0"


def test_the_licences_of_synthetic_scans_and_of_earlier_models_data_are_listed(trained, tmp_path):
    """What the generator of synthetic scans trained on is part of the lineage."""
    run, out = relicensed(trained, tmp_path, "CC0 1.0"), tmp_path / "out"
    content = json.loads((run / "run.json").read_text())
    for cell in content["cells"]:
        own = {"data": None, "manifest_sha256": "0", "folds_sha256": None, "fold": None}
        cell["trained_on"] = [own, {**own, "data": "busi"}]
    (run / "run.json").write_text(json.dumps(content))
    assert main(["export", str(run), str(out), "--fold", "0"]) == 0
    card = (out / "README.md").read_text()
    assert front_matter(out)["datasets"] == ["phantom", "busi"]
    assert front_matter(out)["license"] == "unknown"
    assert "cc-by-nc-4.0 would keep" in card
    assert "**To be settled:** BUSI" in card
