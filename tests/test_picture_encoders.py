"""Vision encoders and their adapters: loaded by folder or wheel, encoded, cached, merged beside the frozen one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import build_encoder, build_vision

from peft_combo.data.pictures import DrawnPicture
from peft_combo.encoder.heads.picture_adapter import PictureAdapter
from peft_combo.encoder.heads.pictures import WIDTH, PictureView
from peft_combo.encoder.pixels import PictureEncoder, loading
from peft_combo.encoder.vectors import VectorCache
from peft_combo.errors import BackboneError, DataError

pytest.importorskip("PIL", reason="pillow is not installed (extra [images])")

KINDS = {"vit": "lora", "clip_vision_model": "lora", "resnet": "bottleneck"}


def draw(slot: str, colour: str, pattern: str, number: int = 0) -> bytes:
    return DrawnPicture(slot, colour, pattern, number).read()


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    drawn = [("Black", "plain"), ("Scarlet", "dots"), ("Lime", "waves"), ("Cobalt", "checks")]
    return [draw("top", colour, pattern, number) for number, (colour, pattern) in enumerate(drawn)]


@pytest.fixture(scope="module", params=KINDS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PictureEncoder:
    return PictureEncoder.load(str(build_vision(tmp_path_factory.mktemp(request.param), request.param)))


def test_an_adapter_starts_as_none_learns_and_leaves_the_frozen_encoder_alone(
    encoder: PictureEncoder, pictures: list[bytes]
) -> None:
    frozen = encoder.adapt(None, None).encode(pictures)
    torch.manual_seed(0)
    adapter = PictureAdapter.suit(encoder.model, encoder.dim, 4)
    assert adapter.kind in KINDS.values()
    pixels = encoder.prepare_all(pictures)

    def run() -> torch.Tensor:
        return encoder.run(pixels, lambda chunk: adapter.encode(encoder.model, chunk))

    start = run()
    np.testing.assert_allclose(start.detach().numpy(), frozen, rtol=1e-4, atol=1e-5)
    start.pow(2).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert not any(parameter.grad is not None for parameter in encoder.model.parameters())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    learned = run().detach().numpy()
    assert np.abs(learned - frozen).max() > 1e-2
    # What serves, merged into a copy, is what was trained; beside it the frozen encoder is as it was.
    served = encoder.adapt(adapter, "digest")
    found = adapter.shift(torch.from_numpy(served.encode(pictures))).detach().numpy()
    np.testing.assert_allclose(found, learned, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(encoder.adapt(None, None).encode(pictures), frozen)
    assert (served.key != encoder.adapt(None, None).key) == (adapter.kind == "lora")
    twin = PictureAdapter.from_spec(adapter.spec())
    twin.load_state_dict(adapter.state_dict())


def test_pictures_are_encoded_once_and_kept_by_their_bytes(
    encoder: PictureEncoder, pictures: list[bytes], tmp_path: Path
) -> None:
    cache, adapted, counts = VectorCache(tmp_path), encoder.adapt(None, None), []
    first = cache.pictures(adapted, [pictures[0], pictures[1], pictures[0]], counts.append)
    assert sum(counts) == 2
    np.testing.assert_array_equal(first[0], first[2])
    again = cache.pictures(adapted, pictures, counts.append)
    assert sum(counts) == 4
    assert isinstance(again, np.memmap)
    np.testing.assert_allclose(again, adapted.encode(pictures), rtol=1e-4, atol=1e-5)


def test_a_folder_that_is_no_vision_encoder_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="embedded-efficientnet"):
        PictureEncoder.load(str(tmp_path / "nowhere"))
    folder = build_vision(tmp_path / "vit")
    (folder / "preprocessor_config.json").rename(tmp_path / "processor.json")
    with pytest.raises(BackboneError, match=r"no preprocessor_config\.json"):
        PictureEncoder.load(str(folder))
    text = build_encoder(tmp_path / "text")
    (tmp_path / "processor.json").rename(text / "preprocessor_config.json")
    with pytest.raises(BackboneError, match="makes no vectors of pictures"):
        PictureEncoder.load(str(text))


def test_bytes_that_are_no_picture_are_told(encoder: PictureEncoder) -> None:
    with pytest.raises(DataError, match="is no picture"):
        encoder.adapt(None, None).encode([b"no picture"])


def test_a_missing_picture_is_a_part_of_zero_whatever_the_adapter(encoder: PictureEncoder) -> None:
    features = np.random.default_rng(0).normal(size=(9, encoder.dim)).astype(np.float32)
    features[4] = 0
    view = PictureView(encoder.dim, PictureAdapter.suit(encoder.model, encoder.dim, 4)).eval()
    view.measure(features)
    with torch.no_grad():
        for parameter in view.parameters():
            parameter.add_(0.1)
    reduced = view.reduce_all(features)
    assert reduced.shape == (9, WIDTH)
    assert not reduced[4].any()
    np.testing.assert_allclose(np.delete(np.linalg.norm(reduced, axis=1), 4), 1, rtol=1e-4)


# --- EfficientNet -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def efficientnet() -> PictureEncoder:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the vision encoder is not installed (extra [images])")
    return PictureEncoder.load("embedded-efficientnet")


def test_the_embedded_encoder_finds_things_of_one_look_alike(efficientnet: PictureEncoder) -> None:
    """Two drawings of one colour and pattern, of other size and tilt, are nearer than any of another look."""
    looks = [("Scarlet", "dots"), ("Cobalt", "stripes"), ("Lime", "plain"), ("Black", "checks")]
    shown = [draw("bag", colour, pattern, number) for number in (1, 2) for colour, pattern in looks]
    vectors = efficientnet.adapt(None, None).encode(shown)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (vectors[:4] @ vectors[4:].T).argmax(axis=1).tolist() == [0, 1, 2, 3]


def test_a_large_picture_is_shrunk_and_a_small_one_is_not_enlarged(efficientnet: PictureEncoder) -> None:
    import io

    from PIL import Image

    sizes = []
    for size in ((600, 300), (96, 96), (10, 4)):
        file = io.BytesIO()
        Image.new("RGB", size, "red").save(file, "JPEG")
        sizes += [tuple(one.shape) for one in efficientnet.prepare_all([file.getvalue()])]
    assert sizes == [(3, 224, 224), (3, 96, 96), (3, 32, 32)]


def test_other_weights_than_those_that_are_known_are_refused(
    efficientnet: PictureEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(BackboneError, match=r"not those of version 0\.1\.0"):
        PictureEncoder.load("embedded-efficientnet")
