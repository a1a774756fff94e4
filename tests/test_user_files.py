"""Images and prompts as other programs leave them."""

import json
import logging
import os
import shutil
import zlib
from itertools import product

import numpy as np
import pytest
from PIL import Image

from leap_align import BadInput
from tests import tiny_pipelines as tiny  # skips without the libraries

# isort: split

from full_scale.contents import files_content
from full_scale.prompts import read_prompts
from full_scale.score import check_image, read_image


@pytest.mark.parametrize("steps, kind", [(257, np.uint16), (1, np.uint8)])
def test_grey_images_of_8_and_16_bits_are_the_same_images(tmp_path, steps, kind):
    Image.fromarray(np.array([[0, 51 * steps, 255 * steps]], kind)).save(tmp_path / "image.png")
    assert read_image(tmp_path / "image.png")[0, :, 0].tolist() == [pytest.approx([0, 0.2, 1])] * 3


@pytest.mark.parametrize("file", ["image.jpg", "image.png", "image.webp", "image.tiff"])
def test_an_image_is_turned_as_its_camera_says(tmp_path, file):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (32, 48), (255, 0, 0)).save(tmp_path / file, exif=exif)
    assert read_image(tmp_path / file).shape == (1, 3, 32, 48)


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.uint16, ">u2"])
def test_images_whose_range_is_unknown_are_refused(tmp_path, kind):
    Image.fromarray(np.ones((2, 2), kind)).save(tmp_path / "image.tiff")
    with pytest.raises(
        BadInput, match=r"image\.tiff has pixels of unknown range \(.*\): save it with 8 bits a channel"
    ):
        check_image(tmp_path / "image.tiff")


def write_png(path, rows):
    """A grey image of 8x8 pixels with a right header and right checksums, which ends after some bytes of rows."""
    header = b"IHDR" + bytes([0, 0, 0, 8, 0, 0, 0, 8, 8, 0, 0, 0, 0])
    chunks = header, b"IDAT" + zlib.compress(bytes(rows)), b"IEND"
    packed = [(len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) for chunk in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def test_a_png_with_fewer_rows_than_its_header_says_is_refused(tmp_path):
    size = 8 * 9
    write_png(tmp_path / "whole.png", size)
    check_image(tmp_path / "whole.png")
    for rows in (size - 1, size // 2, 0):
        write_png(tmp_path / "image.png", rows)
        with pytest.raises(
            BadInput, match=r"image\.png cannot be read as PNG, .* \(it lacks rows of pixels\): replace"
        ):
            check_image(tmp_path / "image.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (13, 7)])
def test_whole_png_files_of_every_mode_are_accepted(tmp_path, mode, size):
    Image.new(mode, size).save(tmp_path / "image.png")
    check_image(tmp_path / "image.png")


def write_broken_image(path, damage):
    """A cut JPEG, pixels that are no compressed data under right checksums, another format, or too many pixels."""
    kind = {"cut": "JPEG", "eps": "EPS", "gif": "GIF"}.get(damage, "PNG")
    Image.effect_noise((64, 64), 50).convert("RGB").save(path, kind)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:1500])
    if damage == "bomb":
        header = b"IHDR" + (20_000).to_bytes(4) * 2 + content[24:29]
        path.write_bytes(content[:12] + header + zlib.crc32(header).to_bytes(4) + content[33:])
    if damage == "pixels":
        start = content.index(b"IDAT")
        size = int.from_bytes(content[start - 4 : start])
        chunk = b"IDAT" + bytes(size)
        path.write_bytes(content[:start] + chunk + zlib.crc32(chunk).to_bytes(4) + content[start + size + 8 :])


REASONS = {"cut": "truncated", "pixels": "unknown compression method"} | dict.fromkeys(
    ["eps", "gif"], "cannot identify"
)


@pytest.mark.parametrize("damage, reason", (REASONS | {"bomb": "Image size .400000000 pixels. exceeds limit"}).items())
def test_a_broken_image_is_named(tmp_path, damage, reason):
    write_broken_image(tmp_path / "image.png", damage)
    message = rf"image\.png cannot be read as PNG, JPEG, WEBP, TIFF, BMP \(.*{reason}.*\): replace it"
    with pytest.raises(BadInput, match=message):
        check_image(tmp_path / "image.png")


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_only_line_feeds_and_carriage_returns_end_a_prompt(tmp_path, end):
    (tmp_path / "p.txt").write_bytes(f"a{end}b\r\n\nc\rd\n".encode())
    assert read_prompts(tmp_path / "p.txt") == [f"a{end}b", "c", "d"]


TABLES = {
    "p.json": '["a", "b"]', "p.jsonl": '{"prompt": "a"}\n{"prompt": "b"}\n', "p.csv": "a,b", "p.tsv": "a\tb",
    "p.txt": '[\n"a",\n"b"]', "q.txt": '{"prompt": "a"}\n{"prompt": "b"}', "r.txt": "[[[[1]]]]",
    "surrogate.txt": '{"prompt": "\\ud800"}', "deep.txt": '{"a":' * 1500 + "1" + "}" * 1500,
    "late.txt": 'a cat\n{"prompt": "a"}\n',
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_no_prompts(tmp_path, name):
    (tmp_path / name).write_text(TABLES[name])
    with pytest.raises(BadInput, match=rf"{name} holds a table or JSON, not text"):
        read_prompts(tmp_path / name)


def test_files_that_are_no_text_are_no_prompts(tmp_path):
    (tmp_path / "16.txt").write_bytes("a cat".encode("utf-16-le"))
    (tmp_path / "long.txt").write_text("a cat\n" + "x" * 10_001)
    os.mkfifo(tmp_path / "pipe")
    words = {"16.txt": "holds zero bytes: save it as UTF-8", "pipe": "is a pipe or a device, read once"}
    words["long.txt"] = "prompt 2 has 10001 characters: 10000 are allowed"
    for name, message in words.items():
        with pytest.raises(BadInput, match=rf"{name}:? {message}"):
            read_prompts(tmp_path / name)
    (tmp_path / "fine.txt").write_text("[a cat]\n{x} dogs\n")
    assert read_prompts(tmp_path / "fine.txt") == ["[a cat]", "{x} dogs"]


LEFT = ("._config.json", "._diffusion_pytorch_model.safetensors", ".DS_Store", "Thumbs.db", "desktop.ini", "@eaDir")
COPIES = ("config (1).json", "config copy.json", "tokenizer-old.json", "notes.txt", "a.model.safetensors.index.json")


@pytest.mark.slow
def test_what_operating_systems_leave_in_a_folder_changes_nothing(models, tmp_path):
    """In the pipeline's folders, in a checkpoint, among scores, and in a folder to fill."""
    expected = tiny.train(tmp_path / "once", tiny.flags(models, "flux"))
    whole = shutil.copytree(models / "flux", tmp_path / "flux")
    shutil.copy(models / "prompts.txt", tmp_path)
    content = files_content(whole, "*")

    def leave(*folders, names=LEFT):
        for folder, name in product(folders, names):
            folder.mkdir(exist_ok=True)
            (folder / name).mkdir(exist_ok=True) if name == "@eaDir" else (folder / name).write_bytes(b"\0\xff")

    parts = [path for path in whole.iterdir() if path.is_dir()]
    leave(*parts, names=COPIES)
    leave(whole, *parts, tmp_path / "run", tmp_path / "images")
    assert files_content(whole, "*") == content
    tiny.train(tmp_path / "run", tiny.flags(tmp_path, "flux", "--iterations", "1"))
    leave(tmp_path / "run" / "checkpoint" / "000001")
    tiny.assert_same_metrics(tiny.train(tmp_path / "run", tiny.flags(tmp_path, "flux", "--resume")), expected)
    tiny.tool(*tiny.sampling(tmp_path, tmp_path / "images"))
    leave(tmp_path / "images")
    tiny.tool(*tiny.scoring(tmp_path, tmp_path / "images", tmp_path / "scores"))


def test_images_that_prompts_json_does_not_name_are_counted(models, tmp_path, capfd):
    tiny.tool(*tiny.sampling(models, tmp_path / "images"))
    rows = tiny.read(tmp_path / "images" / "prompts.json")
    (tmp_path / "images" / "prompts.json").write_text(json.dumps(dict(list(rows.items())[:2])))
    (tmp_path / "images" / "@eaDir").mkdir()
    shutil.copy(tmp_path / "images" / "00000_0.png", tmp_path / "images" / "@eaDir")
    images = (tmp_path / "images").rename(tmp_path / "im\x1b[31m\nages")
    tiny.tool(*tiny.scoring(models, images, tmp_path / "scores"))
    output = "".join(capfd.readouterr())
    assert output.count(r"im\x1b[31m\nages/prompts.json names 2 images; 3 others are not scored") == 1
    assert "\x1b[31m" not in output


@pytest.mark.parametrize("name", ["flux", "sd3", "klein"])
def test_prompts_that_a_tokenizer_cuts_are_counted_once(models, tmp_path, capfd, name):
    """And not printed by the libraries, in full and at every step."""
    (tmp_path / "prompts.txt").write_text(f"a cat\n{'cut me ' * 40}\n{'cut me ' * 90}\n")
    logged, handler = [], logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    tokens = ["--max-sequence-length", "512"]
    training = [*tiny.flags(models, name), *tokens, "--prompts", tmp_path / "prompts.txt", "--iterations", "1"]
    prompts = [*tokens, "--prompts", tmp_path / "prompts.txt"]
    commands = {
        "flux": [*training, "--out", tmp_path / "run"],
        "sd3": tiny.sampling(models, tmp_path / "images", *prompts, "--model", models / "sd3"),
        "klein": tiny.embedding(models, tmp_path / "embedded", *prompts, name="klein"),
    }
    words = {"flux": ["2 of 3 prompts are cut: tokenizer reads 77 tokens", "1 of 3", "tokenizer_2 reads 512 tokens"]}
    words["sd3"] = [*words["flux"][:2], "2 of 3 prompts are cut: tokenizer_2 reads 77", "tokenizer_3 reads 512 tokens"]
    words["klein"] = ["1 of 3 prompts are cut: tokenizer reads 512 tokens"]
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).addHandler(handler)
    try:
        tiny.start(commands[name])
    finally:
        for library in ("diffusers", "transformers"):
            logging.getLogger(library).removeHandler(handler)
    output = "".join(capfd.readouterr())
    assert all(output.count(text) == 1 for text in words[name]) and "cut me" not in output
    assert not [text for text in logged if "truncated" in text or "sequence length" in text]
