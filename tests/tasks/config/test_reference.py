"""The schema carries the words: every key is described, and what is made from the descriptions is current."""

import re
import sys
import zipfile
from pathlib import Path
from subprocess import run

import pytest

from flows.serving.deployments import PrefectFile
from tasks.config import reference
from tasks.config.evaluation import EvaluationRequest
from tasks.config.run import RunConfig
from tasks.config.sweep import SweepConfig

SCHEMAS = (RunConfig, SweepConfig, EvaluationRequest, PrefectFile)


def properties(schema):
    """Every field of a schema and of those in it, as `Schema.key` and its JSON schema."""
    found = schema.model_json_schema()
    for name, part in {schema.__name__: found, **found.get("$defs", {})}.items():
        yield from ((f"{name}.{key}", field) for key, field in part.get("properties", {}).items())


def described(schema, *without):
    return [" ".join(field["description"].split()) for name, field in properties(schema) if name.partition(".")[0] not in without]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_field_is_described(schema):
    for name, field in properties(schema):
        text = field.get("description", "")
        assert text and text[0].isupper() or text.startswith("http"), name
        assert text.endswith("."), name


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_description_names_every_word_that_its_key_takes(schema):
    for name, field in properties(schema):
        kinds = [field, *field.get("anyOf", [])]
        words = [word for kind in kinds for word in kind.get("enum", [kind["const"]] if "const" in kind else []) if isinstance(word, str)]
        missing = [word for word in words if not re.search(rf"\b{word}\b", field["description"])]
        assert not missing, f"{name}: {missing}"


def test_the_files_are_current():
    stale = [path.name for path, text in reference.files() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    assert not stale, f"{stale} differ from the schemas: run `make reference`"


@pytest.mark.parametrize(
    ("name", "schema", "without"),
    [
        ("configs/quantize.yaml", RunConfig, ("Allocate", "PerplexityMeasure", "TasksMeasure")),  # only the entries' own files hold these
        ("configs/sweep.yaml", SweepConfig, ()),
        ("docs/reference.md", RunConfig, ()),
        ("docs/reference.md", SweepConfig, ()),
        ("docs/reference.md", EvaluationRequest, ()),
    ],
)
def test_every_description_is_in_the_files(name, schema, without, request):
    text = (request.config.rootpath / name).read_text(encoding="utf-8").replace("\\|", "|").replace("&lt;", "<")
    text = re.sub(r"\n +# ", " ", text) if name.endswith("yaml") else text
    missing = [words for words in described(schema, *without) if words not in text]
    assert not missing


@pytest.mark.parametrize("key", reference.SETS[1:])
def test_a_missing_key_of_the_recipes_is_put_into_the_config_again(key, request):
    text = (request.config.rootpath / "configs" / "quantize.yaml").read_text(encoding="utf-8")
    cut = re.sub(rf"  # {key}: .*\n( {{35}}# .*\n)*", "", text)
    assert cut != text and reference.commented(reference.completed(cut), RunConfig) == text


def test_comments_are_made_again_and_all_else_stays():
    text = (
        "# A head.\nmodel:  # stale\n  path: 'a # b'  # stale: words\n"
        f"{'':35}# the rest of stale words\n  # revision: main   # stale\n  # A line of its own.\n\nother: 3  # kept\n"
    )
    found = reference.commented(text, RunConfig)
    assert found == reference.commented(found, RunConfig)
    assert (
        "stale" not in found and "other: 3  # kept\n" in found and "  # A line of its own.\n\n" in found and found.startswith("# A head.\n")
    )
    assert f"  path: 'a # b'{'':20}# Folder of a Hugging Face" in found and "  # revision: main                 # Branch, tag" in found


def test_the_help_of_a_key_is_the_first_sentence_of_its_description():
    assert reference.help_of("quantization.bits") == "Bits per weight: 2, 3, 4 or 8."
    for schema, first in ((SweepConfig, "sweep"), (EvaluationRequest, "evaluate"), (RunConfig, "run")):
        for key, words in zip(schema.model_fields, described(schema), strict=False):
            sentence = reference.help_of(f"{first}.{key}")
            assert words.startswith(sentence) and sentence.endswith(".") and words[len(sentence) :][:1] in ("", " ")
    for wrong in ("bits", "quantization.bitz", "nonsense.bits"):
        with pytest.raises(LookupError, match=wrong):
            reference.help_of(wrong)


def test_descriptions_are_there_in_a_zipped_package(tmp_path, request):
    root = request.config.rootpath
    with zipfile.ZipFile(tmp_path / "engine.zip", "w") as archive:
        for name in ("__init__", "config", "schema"):
            archive.write(root / "gptq_core" / f"{name}.py", f"gptq_core/{name}.py")
    code = "import gptq_core.config as c; print(c.__file__, c.QuantizeConfig.model_fields['bits'].description)"
    done = run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=path_of(tmp_path / "engine.zip"))
    assert done.returncode == 0, done.stderr
    assert "engine.zip" in done.stdout and done.stdout.strip().endswith("Bits per weight: 2, 3, 4 or 8.")


def path_of(archive: Path) -> dict[str, str]:
    """An environment in which the archive comes before every installed package."""
    return {"PYTHONPATH": ":".join([str(archive), *(path for path in sys.path if path.endswith("site-packages"))])}
