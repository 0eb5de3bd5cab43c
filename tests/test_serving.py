"""What a server answers is what the library computes, and what it refuses it refuses in a sentence."""

import base64
import concurrent.futures
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from softvq.data.images import center_crop, read_image, to_image, to_tensor
from softvq.data.latents import read_latents
from softvq.errors import InputError
from softvq.pipeline import GenerationPipeline
from softvq.serving.limits import Limits
from softvq.serving.models import Models
from softvq.tokenizers.autoencoder import ImageTokenizer
from tests.generators import CLASSES, make_generator
from tests.program import DIM, MODEL, SIZE, TOKENS, photograph, png
from tests.serving import Answer, Served, load, serving

LIMITS = Limits(batch=4, images=3, steps=12, pixels=10_000, body_bytes=100_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served") / "generator"
    make_generator(made)
    return made


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving(load(folder), LIMITS, local=True) as found:
        yield found


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> GenerationPipeline:
    return GenerationPipeline.from_pretrained(folder)


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def alike(data: bytes, image: torch.Tensor) -> bool:
    """Return whether a PNG file is an image of the library's; batches of other sizes round otherwise, by a level."""
    wanted = np.asarray(to_image(image)).astype(int)
    return bool(np.abs(pixels(data) - wanted).max() <= 1)


@torch.inference_mode()
def test_images_and_latents_are_those_of_the_library(served: Served, tmp_path: Path) -> None:
    tokenizer, data = served.models.tokenizer, png(photograph())
    latents = tokenizer.encode(to_tensor(center_crop(read_image(data), SIZE))[None])
    wanted = tokenizer.decode(latents)[0]
    assert alike(served.client.reconstruct(data), wanted)
    encoded = served.image("/v1/encode", data).json
    torch.testing.assert_close(torch.tensor([encoded["latents"]]), latents, rtol=0, atol=1e-5)
    assert encoded["tokenizer"] == tokenizer.latent_fingerprint()
    assert alike(served("POST", "/v1/decode", encoded).body, wanted)
    assert alike(served.client.decode(served.client.encode(data)), wanted)
    file = served.image("/v1/encode?format=safetensors", data)
    (tmp_path / "one.safetensors").write_bytes(file.body)
    content = read_latents(tmp_path / "one.safetensors", tokenizer.latent_fingerprint())
    assert content.sizes.tolist() == [[SIZE, SIZE]]
    again = served("POST", "/v1/decode", file.body, content_type="application/octet-stream")
    assert again.headers["content-type"] == "image/png"
    assert alike(again.body, wanted)


def test_an_image_is_that_of_its_label_and_seed_in_any_batch(served: Served, pipeline: GenerationPipeline) -> None:
    labels, seeds = ["bee", 0, "2"], [5, 6, 2**53 - 1]
    wanted = pipeline(labels, seed=seeds, steps=2, guidance=2.0)
    together = served.client.generate(labels, seeds, steps=2, guidance=2.0)
    alone = [served.client.generate([a], [b], steps=2, guidance=2.0)[0] for a, b in zip(labels, seeds, strict=True)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:  # which the server computes in batches as they come
        asked = [
            pool.submit(served.client.generate, [labels[i % 3]], [seeds[i % 3]], steps=2, guidance=2.0)
            for i in range(6)
        ]
        crowd = [one.result()[0] for one in asked]
    for place, image in enumerate([*together, *alone, *crowd]):
        assert alike(image, wanted[place % 3])
    assert not alike(together[0], wanted[1])


def test_seeds_that_were_drawn_are_told(served: Served) -> None:
    found = served("POST", "/v1/generate", {"labels": [0, 0]}).json
    assert found["images"][0] != found["images"][1]
    again = served("POST", "/v1/generate", {"labels": [0, 0], "seeds": found["seeds"]}).json
    near = [
        np.abs(pixels(base64.b64decode(a)) - pixels(base64.b64decode(b))).max()
        for a, b in zip(found["images"], again["images"], strict=True)
    ]
    assert max(near) <= 1


def told(answer: Answer) -> list[tuple[str, dict[str, Any]]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.body.decode().strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_stream_shows_previews_and_ends_with_the_images(served: Served, pipeline: GenerationPipeline) -> None:
    asked = {"labels": ["ant", "cat"], "seeds": [1, 2], "steps": 8, "previews": 3}
    events = told(served("POST", "/v1/generate/stream", asked))
    assert [name for name, _ in events] == ["preview"] * 3 + ["images"]
    assert [data["step"] for _, data in events[:3]] == [2, 4, 6]
    last = events[-1][1]
    assert last["seeds"] == [1, 2]
    wanted = pipeline(["ant", "cat"], seed=[1, 2], steps=8)
    assert all(alike(base64.b64decode(a), b) for a, b in zip(last["images"], wanted, strict=True))
    errors = [
        np.abs(pixels(base64.b64decode(data["images"][0])) - pixels(base64.b64decode(last["images"][0]))).mean()
        for _, data in events
    ]
    assert errors[0] > errors[2] > errors[3] == 0  # it comes ever nearer


def test_what_is_loaded_is_told(served: Served, folder: Path, pipeline: GenerationPipeline) -> None:
    found = served.client.models()
    assert found["tokenizer"]["fingerprint"] == pipeline.tokenizer.fingerprint()
    assert (found["tokenizer"]["tokens"], found["tokenizer"]["dim"]) == (TOKENS, DIM)
    assert found["generator"]["fingerprint"] == pipeline.generator.fingerprint()
    assert found["generator"]["classes"] == list(CLASSES)
    assert served("GET", "/healthz").json == {"status": "ok"}
    assert served("GET", "/readyz").json == {"status": "ready"}


def test_metrics_count(served: Served) -> None:
    def count(text: str, name: str) -> float:
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    before = served("GET", "/metrics").body.decode()
    served.image("/v1/encode", png(photograph()))
    served.image("/v1/encode", b"")
    served("GET", "/nothing")
    after = served("GET", "/metrics").body.decode()
    for name, more in {
        'softvq_requests_total{endpoint="/v1/encode",status="200"}': 1,
        'softvq_requests_total{endpoint="/v1/encode",status="422"}': 1,
        'softvq_requests_total{endpoint="other",status="404"}': 1,
        'softvq_batch_images_sum{kind="encode"}': 1,
        "softvq_inside_requests": 0,
    }.items():
        assert count(after, name) - count(before, name) == more, name


PHOTO = png(photograph())
ROWS = [[0.0] * DIM] * TOKENS
REFUSED = {
    "no image": ("/v1/encode", b"not an image", 422, "is not a JPEG, PNG or WebP"),
    "nothing": ("/v1/reconstruct", b"", 422, "is empty"),
    "half an image": ("/v1/encode", PHOTO[: len(PHOTO) // 2], 422, "damaged or cut short"),
    "too many pixels": ("/v1/encode", png(Image.new("RGB", (101, 100))), 422, "the limit is 10,000"),
    "too many bytes": ("/v1/encode", bytes(100_001), 413, "more than 100,000 bytes"),
    "too many tokens": ("/v1/reconstruct?tokens=5", PHOTO, 422, "tokens: input should be less than or equal to 4"),
    "an odd format": ("/v1/encode?format=pickle", PHOTO, 422, "format: "),
    "too few rows": ("/v1/decode", {"latents": ROWS[:3]}, 422, "latents: list should have at least 4"),
    "short rows": ("/v1/decode", {"latents": [row[:3] for row in ROWS]}, 422, "latents.0: list should have at least 8"),
    "huge numbers": ("/v1/decode", {"latents": [[1e30] * DIM] * TOKENS}, 422, "less than or equal to 1000"),
    "another's latents": ("/v1/decode", {"latents": ROWS, "tokenizer": "f00"}, 422, "tokenizer is 'f00'"),
    "no JSON": ("/v1/decode", b"{", 422, "invalid JSON"),
    "a class nobody knows": ("/v1/generate", {"labels": ["be"]}, 422, "did you mean 'bee'?"),
    "a class out of range": ("/v1/generate", {"labels": [3]}, 422, "class 3 is out of range"),
    "a half surrogate": ("/v1/generate", b'{"labels": ["\\ud800"]}', 422, "is no class"),
    "true as a class": ("/v1/generate", {"labels": [True]}, 422, "labels.0"),
    "too many images": ("/v1/generate", {"labels": [0] * 4}, 422, "labels: list should have at most 3"),
    "seeds for others": ("/v1/generate", {"labels": [0, 1], "seeds": [1]}, 422, "1 seeds for 2 images"),
    "too many steps": ("/v1/generate", {"labels": [0], "steps": 13}, 422, "steps: input should be less"),
    "too much guidance": ("/v1/generate", {"labels": [0], "guidance": 21}, 422, "guidance: input should be less"),
    "no number": ("/v1/generate", b'{"labels": [0], "guidance": NaN}', 422, "guidance: input should be"),
    "a field nobody knows": ("/v1/generate", {"labels": [0], "stepz": 1}, 422, "stepz: extra inputs"),
    "too many previews": ("/v1/generate/stream", {"labels": [0], "previews": 17}, 422, "previews: "),
    "a number in quotes": ("/v1/generate", {"labels": [0], "guidance": "2"}, 422, "guidance: input should be a valid"),
    "true as a number": ("/v1/decode", {"latents": [[True] * DIM] * TOKENS}, 422, "latents.0.0: input should be a"),
    "no text": ("/v1/generate", b"\xff", 400, "the body is no JSON in UTF-8"),
    "brackets": ("/v1/generate", b"[" * 99_000, 422, ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_in_a_sentence(served: Served, name: str) -> None:
    path, body, status, words = REFUSED[name]
    kind = "application/json" if "decode" in path or "generate" in path else "image/png"
    answer = served("POST", path, body, content_type=kind)
    assert answer.status in {status, 400 if name == "brackets" else status}, answer
    assert words in answer.error


@pytest.mark.parametrize("path", ["generate", "generate/stream", "decode"])
@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", ""])
def test_what_is_to_be_json_has_to_say_so(served: Served, path: str, kind: str) -> None:
    answer = served("POST", f"/v1/{path}", {"labels": [0]}, content_type=kind)
    assert answer.status == 415
    assert "expected application/json" in answer.error


def test_other_roads_are_closed(served: Served) -> None:
    assert (answer := served("GET", "/v2/encode")).status == 404
    assert "/openapi.json" in answer.error
    assert served("DELETE", "/v1/models").status == 405
    assert "content-type is 'text/plain'" in served("POST", "/v1/decode", b"{}", content_type="text/plain").error
    assert served("GET", "/healthz", host="attacker.example").status == 421  # a page that calls us by its own name
    assert served("GET", "/healthz", host="localhost:1").status == 200
    assert served("GET", "/healthz", x_request_id="mine-1").headers["x-request-id"] == "mine-1"
    assert served("GET", "/healthz", x_request_id="a b").headers["x-request-id"] != "a b"


def test_a_latent_file_of_another_tokenizer_is_refused(served: Served) -> None:
    data = served.image("/v1/encode?format=safetensors", PHOTO).body
    own = served.models.latent_fingerprint.encode()
    for wrong, words in {
        data.replace(own, own[::-1]): "belong to tokenizer",
        data[:-4]: "not a whole",
        b"": "not a whole",
    }.items():
        answer = served("POST", "/v1/decode", wrong, content_type="application/octet-stream")
        assert answer.status == 422
        assert words in answer.error


def test_examples_of_the_schema_are_answered(served: Served) -> None:
    schema = served("GET", "/openapi.json").json
    assert {path for path in schema["paths"] if path.startswith("/v1/")} == {
        "/v1/models", "/v1/reconstruct", "/v1/encode", "/v1/decode", "/v1/generate", "/v1/generate/stream",
    }  # fmt: skip
    asked = 0
    for path, methods in schema["paths"].items():
        body = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        found = body.get("schema", {})
        found = schema["components"]["schemas"][found["$ref"].rpartition("/")[2]] if "$ref" in found else found
        for example in found.get("examples", []):
            asked += 1
            assert served("POST", path, example).status == 200, path
    assert asked == 3


@pytest.mark.parametrize("kind", ["dit", "mar"])
def test_other_generators_show_previews_too(kind: str, tmp_path: Path) -> None:
    make_generator(tmp_path, kind)
    with serving(load(tmp_path), LIMITS) as found:
        events = told(found("POST", "/v1/generate/stream", {"labels": [1], "seeds": [3], "previews": 1}))
        assert [name for name, _ in events] == ["preview", "images"]
        if kind == "mar":
            assert found("POST", "/v1/generate", {"labels": [1], "steps": TOKENS + 1}).status == 422


def test_a_generator_without_classes_takes_seeds_alone(tmp_path: Path) -> None:
    make_generator(tmp_path, condition="none")
    with serving(load(tmp_path), LIMITS) as found:
        assert len(found.client.generate(None, [1, 2])) == 2
        assert found("POST", "/v1/generate", {"labels": [0], "seeds": [1]}).status == 422
        assert found("POST", "/v1/generate", {"seeds": [1], "guidance": 2}).status == 422


def test_without_a_generator_nothing_is_generated(folder: Path) -> None:
    with serving(load(folder, generator=False)) as found:
        assert found.client.models()["generator"] is None
        with pytest.raises(InputError, match="there is no /v1/generate"):
            found.client.generate([0])


@torch.inference_mode()
def test_fewer_tokens_where_the_tokenizer_takes_fewer() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = ImageTokenizer(dataclasses.replace(MODEL, min_latent_tokens=2)).eval()
    latents = tokenizer.encode(to_tensor(center_crop(read_image(PHOTO), SIZE))[None])
    with serving(Models(tokenizer)) as found, concurrent.futures.ThreadPoolExecutor(6) as pool:
        counts = [2, 3, 4, 2, 3, 4]
        asked = [pool.submit(found.client.reconstruct, PHOTO, tokens) for tokens in counts]
        for one, tokens in zip(asked, counts, strict=True):
            assert alike(one.result(), tokenizer.decode(latents[:, :tokens])[0])
        assert not alike(asked[0].result(), tokenizer.decode(latents)[0])
        assert alike(found.client.decode(latents[0, :3].tolist()), tokenizer.decode(latents[:, :3])[0])
        assert found.image("/v1/reconstruct?tokens=1", PHOTO).status == 422


def test_limits_are_checked() -> None:
    for name, value in {"queue": 0, "deadline": 0.0, "batch": 0, "pixels": 10**9}.items():
        with pytest.raises(InputError, match=f"{name} is"):
            dataclasses.replace(Limits(), **{name: value})
    with pytest.raises(InputError, match="at most batch"):
        Limits(batch=2, images=3)
