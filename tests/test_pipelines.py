"""The registered pipelines: what the published model cards do, every form of input, and cn_clip's own numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cn_clip.clip.model import CLIP
from cn_clip.clip.utils import image_transform, tokenize
from modelscope.models import Model
from modelscope.pipelines import pipeline
from modelscope.preprocessors import Preprocessor
from modelscope.utils.constant import Tasks
from PIL import Image

import modelscope_cnclip
from modelscope_cnclip.encoder import ItemError
from modelscope_cnclip.model import CnclipModel
from modelscope_cnclip.pipelines import ImageTextRetrievalPipeline, MultiModalEmbeddingPipeline
from modelscope_cnclip.preprocessor import CnclipPreprocessor

from .conftest import CONFIGS, VIT
from .loopback_hub import LoopbackHub

ID = "damo/multi-modal_clip-vit-base-patch16_zh"
TEXTS = ["杰尼龟", "妙蛙种子", "小火龙", "皮卡丘"]
MIXED = ["猫", "一只橘色的猫趴在窗台上晒太阳", "", "a photo of a cat", "两条狗", "咖啡", "雨天的街道，行人打着伞"]

Pipeline = MultiModalEmbeddingPipeline


class Upstream:
    """cn_clip's own model, tokenizer and picture transform with a tiny checkpoint's weights."""

    def __init__(self, file: Path, tower: str) -> None:
        config = CONFIGS[tower]
        vision = {"vision_patch_size": None} | config.vision_dict()
        self.model = CLIP(**vision, **config.text_dict()).eval()
        state = torch.load(file, weights_only=True)["state_dict"]
        missing, unexpected = self.model.load_state_dict(
            {key.removeprefix("module."): value for key, value in state.items()}, strict=False
        )
        assert not unexpected
        assert all("pooler" in key or "position_ids" in key for key in missing)
        self.transform = image_transform(config.image_resolution)

    @torch.no_grad()
    def images(self, paths: list[Path]) -> np.ndarray:
        pixels = torch.stack([self.transform(Image.open(path)) for path in paths])
        return F.normalize(self.model.encode_image(pixels), dim=-1).numpy()

    @torch.no_grad()
    def texts(self, texts: list[str]) -> np.ndarray:
        return F.normalize(self.model.encode_text(tokenize(texts)), dim=-1).numpy()


@pytest.fixture(scope="module")
def upstream(make_folder: Callable[..., Path]) -> Callable[[str], Upstream]:
    return lambda tower: Upstream(make_folder(tower, "cn_clip"), tower)


@pytest.fixture(scope="module")
def pipe(model_folder: Path) -> Pipeline:
    return pipeline(Tasks.multi_modal_embedding, model=str(model_folder))


@pytest.fixture
def batches(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[int]]]:
    """How many pictures and texts each forward pass had."""
    seen: dict[str, list[int]] = {"image": [], "text": []}

    def watch(side: str, genuine: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
        def call(values: Any) -> np.ndarray:
            seen[side].append(len(values))
            return genuine(values)

        return call

    for side in seen:
        monkeypatch.setattr(pipe.encoder.backend, side, watch(side, getattr(pipe.encoder.backend, side)))
    return seen


def close(a: Any, b: Any, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


# What the model cards on the Hub show.


def test_the_published_snippet_runs_as_it_is(
    hub: LoopbackHub,
    model_folder: Path,
    pictures: list[Path],
    upstream: Callable[[str], Upstream],
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub.add_model(ID, model_folder)
    input_img = Image.open(pictures[0])  # the card: load_image(URL), which gives a PIL picture
    input_texts = TEXTS

    pipe = pipeline(task=Tasks.multi_modal_embedding, model="damo/multi-modal_clip-vit-base-patch16_zh")
    img_embedding = pipe.forward({"img": input_img})["img_embedding"]
    text_embedding = pipe.forward({"text": input_texts})["text_embedding"]
    with torch.no_grad():
        logits_per_image = (img_embedding / pipe.model.temperature) @ text_embedding.t()
        probs = logits_per_image.softmax(dim=-1).cpu().numpy()

    oracle = upstream("vit")
    with torch.no_grad():
        theirs, _ = oracle.model.get_similarity(oracle.transform(input_img)[None], tokenize(input_texts))
    assert isinstance(pipe, Pipeline)
    assert probs.shape == (1, len(TEXTS))
    close(probs, theirs.softmax(dim=-1), atol=1e-4)  # cosines to 1e-5, times a logit scale of 14
    close(pipe.model.temperature, 1 / oracle.model.logit_scale.exp().detach(), atol=1e-7)
    complaints = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [text for text in complaints if "definition is missing" in text or "not found in ast index" in text]


@pytest.mark.parametrize("model_id", ["damo/x", "iic/multi-modal_clip-vit-base-patch16_zh", "someone/else"])
def test_pictures_one_or_many_and_texts_one_or_many(
    model_id: str, hub: LoopbackHub, model_folder: Path, pictures: list[Path], upstream: Callable[[str], Upstream]
) -> None:
    hub.add_model(model_id, model_folder)
    pipe = pipeline(task=Tasks.multi_modal_embedding, model=model_id)
    images = [Image.open(path) for path in pictures[:3]]
    many = pipe.forward({"img": images, "text": TEXTS})
    for key, expected in (
        ("img_embedding", upstream("vit").images(pictures[:3])),
        ("text_embedding", upstream("vit").texts(TEXTS)),
    ):
        assert isinstance(many[key], torch.Tensor)
        assert many[key].dtype == torch.float32
        assert not many[key].requires_grad
        close(many[key], expected)
    one = pipe.forward({"text": TEXTS[0]})
    assert one["img_embedding"] is None
    close(one["text_embedding"], many["text_embedding"][:1])


def test_a_task_alone_takes_the_default_model(hub: LoopbackHub, model_folder: Path) -> None:
    hub.add_model(ID, model_folder)
    pipe = pipeline(Tasks.multi_modal_embedding)
    assert isinstance(pipe, Pipeline)
    assert pipe("一只猫")["text_embedding"].shape == (1, VIT.embed_dim)
    assert any(request.path == f"/api/v1/models/{ID}/repo" for request in hub.requests)


def test_model_and_preprocessor_by_id(hub: LoopbackHub, model_folder: Path, pipe: Pipeline) -> None:
    hub.add_model(ID, model_folder)
    preprocessor = Preprocessor.from_pretrained(ID)
    assert "pytorch_model.bin" not in {request.query.get("FilePath") for request in hub.requests}
    model = Model.from_pretrained(ID)
    assert (type(model), type(preprocessor)) == (CnclipModel, CnclipPreprocessor)
    close(model(preprocessor({"text": TEXTS}))["text_embedding"], pipe({"text": TEXTS})["text_embedding"], atol=1e-6)


def test_a_model_that_is_loaded_already(model_folder: Path, pipe: Pipeline) -> None:
    model = Model.from_pretrained(str(model_folder))
    loaded = pipeline(Tasks.multi_modal_embedding, model=model)
    assert loaded.model is model
    close(loaded(TEXTS[0])["text_embedding"], pipe(TEXTS[0])["text_embedding"], atol=0)


def test_another_model_is_refused() -> None:
    class Other(Model):
        def forward(self) -> None: ...

    with pytest.raises(TypeError, match="CnclipModel"):
        MultiModalEmbeddingPipeline(Other("."))


# Every layout and tower, and cn_clip's numbers.


@pytest.mark.parametrize("layout", ["modelscope", "cn_clip", "transformers"])
def test_every_layout_by_our_own_name(
    layout: str, make_folder: Callable[..., Path], pictures: list[Path], upstream: Callable[[str], Upstream]
) -> None:
    pipe = pipeline(
        Tasks.multi_modal_embedding,
        model=str(make_folder("vit", layout)),
        pipeline_name="cnclip-multi-modal-embedding",
    )
    result = pipe({"img": [str(path) for path in pictures], "text": MIXED})
    close(result["img_embedding"], upstream("vit").images(pictures))
    close(result["text_embedding"], upstream("vit").texts(MIXED))


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_folders_of_ours_need_no_trust_and_equal_cn_clip(
    tower: str, make_folder: Callable[..., Path], pictures: list[Path], upstream: Callable[[str], Upstream]
) -> None:
    pipe = pipeline(Tasks.multi_modal_embedding, model=str(make_folder(tower)), trust_remote_code=False)
    result = pipe({"img": pictures, "text": MIXED})
    close(result["img_embedding"], upstream(tower).images(pictures))
    close(result["text_embedding"], upstream(tower).texts(MIXED))


def test_a_folder_with_another_backbone(make_folder: Callable[..., Path], pictures: list[Path]) -> None:
    """A tower that the built-in doesn't know is filed under our own names."""
    pipe = pipeline(Tasks.multi_modal_embedding, model=str(make_folder("timm")), trust_remote_code=False)
    result = pipe({"img": pictures[:2], "text": TEXTS})
    reference = pipe.model.clip_model
    with torch.no_grad():
        pixels = torch.stack([pipe.encoder.transform(path) for path in pictures[:2]])
        close(result["img_embedding"], F.normalize(reference.encode_image(pixels), dim=-1))
    assert result["text_embedding"].shape == (len(TEXTS), VIT.embed_dim)


def test_saving_and_loading_again(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.model.save_pretrained(tmp_path / "saved")
    again = pipeline(Tasks.multi_modal_embedding, model=str(tmp_path / "saved"))
    close(again({"text": MIXED})["text_embedding"], pipe({"text": MIXED})["text_embedding"], atol=0)


# Forms of input.


def test_image_text_retrieval_says_image(model_folder: Path, pipe: Pipeline, pictures: list[Path]) -> None:
    retrieval = pipeline(Tasks.image_text_retrieval, model=str(model_folder))
    assert type(retrieval) is ImageTextRetrievalPipeline
    result = retrieval({"image": str(pictures[0]), "text": TEXTS})
    expected = pipe({"img": str(pictures[0]), "text": TEXTS})
    for key in expected:
        close(result[key], expected[key], atol=0)


FORMS: dict[str, Callable[[Path], Any]] = {
    "path str": str,
    "Path": lambda path: path,
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "PIL": Image.open,
    "array": lambda path: np.array(Image.open(path).convert("RGB")),
    "list": lambda path: [str(path)],
    "tuple": lambda path: (Image.open(path),),
    "generator": lambda path: (p for p in [path]),
    "4-d array": lambda path: np.array(Image.open(path).convert("RGB"))[None],
}


@pytest.mark.parametrize("form", list(FORMS))
def test_a_picture_in_every_form(form: str, pipe: Pipeline, pictures: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.open(pictures[0]).convert("RGB").save(path)
    expected = pipe({"img": path})["img_embedding"]
    result = pipe({"img": FORMS[form](path)})
    assert result["text_embedding"] is None
    assert result["img_embedding"].dtype == np.float32
    assert result["img_embedding"].shape == (1, VIT.embed_dim)
    close(result["img_embedding"], expected, atol=0)
    if form in ("bytes", "bytearray", "PIL", "array"):  # those are pictures without a dict around them too
        close(pipe(FORMS[form](path))["img_embedding"], expected, atol=0)


def test_a_bare_str_is_a_text(pipe: Pipeline, pictures: list[Path]) -> None:
    result = pipe(str(pictures[0]))
    assert result["img_embedding"] is None
    close(result["text_embedding"], pipe({"text": [str(pictures[0])]})["text_embedding"], atol=0)


def test_mixed_records_equal_one_at_a_time(pipe: Pipeline, pictures: list[Path]) -> None:
    """Sides missing here and there, lists of several lengths, empty lists, bare values, all in one call."""
    records = [
        {"img": str(pictures[0]), "text": MIXED[1]},
        MIXED[0],
        {"text": MIXED},
        Image.open(pictures[3]),
        {"img": [pictures[1], Image.open(pictures[2]), pictures[0].read_bytes()]},
        {"img": None, "text": "狗"},
        {"img": pictures[5], "text": None},
        {"img": [], "text": TEXTS[:2]},
        {"image": pictures[4]},
    ]
    counts = [(1, 1), (0, 1), (0, len(MIXED)), (1, 0), (3, 0), (0, 1), (1, 0), (0, 2), (1, 0)]
    together = pipe(records, batch_size=3)
    assert len(together) == len(records)
    for record, result, (images, texts) in zip(records, together, counts):
        alone = pipe(record)
        assert result.keys() == alone.keys() == {"img_embedding", "text_embedding"}
        for key, count in (("img_embedding", images), ("text_embedding", texts)):
            assert (result[key] is None) == (alone[key] is None)
            assert (0 if result[key] is None else len(result[key])) == count
            if count:
                assert result[key].dtype == np.float32
                close(result[key], alone[key], atol=2e-6)


@pytest.mark.parametrize("nothing", [[], ()])
def test_no_records(nothing: Any, pipe: Pipeline) -> None:
    assert pipe(nothing) == []


def test_empty_sides(pipe: Pipeline) -> None:
    result = pipe({"img": [], "text": []})
    assert {key: value.shape for key, value in result.items()} == {
        "img_embedding": (0, VIT.embed_dim),
        "text_embedding": (0, VIT.embed_dim),
    }


@pytest.mark.parametrize(
    ("batch_size", "images", "texts"), [(None, [12], [10]), (5, [5, 5, 2], [5, 5]), (1, [1] * 12, [1] * 10)]
)
def test_a_list_is_batched_across_records(
    batch_size: int | None,
    images: list[int],
    texts: list[int],
    pipe: Pipeline,
    pictures: list[Path],
    batches: dict[str, list[int]],
) -> None:
    records: list[dict[str, Any]] = [{"img": path, "text": f"第{i}张"} for i, path in enumerate(pictures[:8])]
    records += [{"img": pictures[8:12]}, {"text": ["猫", "狗"]}]
    pipe(records, batch_size=batch_size)
    assert batches == {"image": images, "text": texts}


def test_one_record_is_batched_too(pipe: Pipeline, pictures: list[Path], batches: dict[str, list[int]]) -> None:
    pipe({"img": pictures, "text": MIXED}, batch_size=4)
    assert batches == {"image": [4, 4, 4], "text": [4, 3]}


# Errors.


@pytest.mark.parametrize("value", [3, None, 2.5, ["猫", 3], [["猫"]], {"text"}, torch.zeros(1)])
def test_a_record_of_another_form(value: Any, pipe: Pipeline) -> None:
    with pytest.raises(TypeError, match="expected a dict, a str or a picture"):
        pipe(value)


@pytest.mark.parametrize(
    ("record", "found"), [({}, "nothing"), ({"caption": "猫"}, "'caption'"), ({"img": None}, "'img'")]
)
def test_a_record_without_a_side(record: dict[str, Any], found: str, pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match=f"needs 'img' or 'text'; this one has {found}"):
        pipe(record)
    with pytest.raises(ValueError, match="needs 'img' or 'text'"):
        pipe(["猫", record])


def test_a_bad_picture_is_named(pipe: Pipeline, pictures: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"<html>not found</html>")
    with pytest.raises(ItemError, match=r"item 3: .*bad\.jpg.*HTML") as caught:
        pipe([{"img": pictures[0]}, "猫", {"img": [pictures[1], pictures[2], bad]}])
    assert caught.value.index == 3
    with pytest.raises(ItemError, match=r"item 1: .*no such file"):
        pipe.forward({"img": [pictures[0], str(tmp_path / "gone.png")]})


def test_a_text_that_is_no_str_is_named(pipe: Pipeline) -> None:
    with pytest.raises(ItemError, match=r"item 1: .*expected a str, got int"):
        pipe({"text": ["猫", 3]})


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(modelscope_cnclip.HubError, match=r"gone\.pt: no such file"):
        pipeline(
            Tasks.multi_modal_embedding,
            model=str(tmp_path / "gone.pt"),
            pipeline_name="cnclip-multi-modal-embedding",
        )


# Settings.


def test_a_preprocessor_with_settings_of_its_own(model_folder: Path, pipe: Pipeline, upstream: Callable) -> None:
    short = CnclipPreprocessor(str(model_folder), context_length=8)
    cut = pipeline(Tasks.multi_modal_embedding, model=str(model_folder), preprocessor=short)
    long = MIXED[1]
    oracle = upstream("vit")
    with torch.no_grad():
        expected = F.normalize(oracle.model.encode_text(tokenize([long], context_length=8)), dim=-1)
    close(cut(long)["text_embedding"], expected)
    assert np.abs(cut(long)["text_embedding"] - pipe(long)["text_embedding"]).max() > 1e-3


def test_precision_is_a_keyword(model_folder: Path, pipe: Pipeline) -> None:
    half = pipeline(Tasks.multi_modal_embedding, model=str(model_folder), precision="bf16", device="cpu")
    assert (pipe.encoder.backend.precision, half.encoder.backend.precision) == ("fp32", "bf16")
    cosines = (half({"text": MIXED})["text_embedding"] * pipe({"text": MIXED})["text_embedding"]).sum(-1)
    assert cosines.min() >= 0.999
