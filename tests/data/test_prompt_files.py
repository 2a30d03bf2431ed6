"""Files of prompts, as their benchmarks publish them."""

import json
from pathlib import Path

import pytest

from vtp.artefact import ArtefactError
from vtp.data.prompt_files import read_prompts

OBJECTS = [
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}]},
    {"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "tie", "position": ["right of", 0]}]},
]
OBJECTS = [values | {"prompt": f"a photo of {values['tag']}"} for values in OBJECTS]
TABLE = """item_id,text,keywords,proposition_id,dependency,question_natural_language
whoops22,"A cat, said ""meow"",
on a mat.",,1,0,Is there a cat?
whoops22,"A cat, said ""meow"",
on a mat.",,2,1,"On a mat, is it?"
drawtext12,A sign.,,1,0,Is there a sign?
"""


def written(folder, content):
    path = folder / "prompts"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(prompts):
    return [(prompt.name, prompt.text) for prompt in prompts]


def test_a_line_is_a_prompt(tmp_path):
    path = written(tmp_path, "\ufeffa dog \r\n a café\u2028and a cat\na dog\n")
    assert texts(read_prompts(path, "lines")) == [("1", "a dog"), ("2", "a café\u2028and a cat"), ("3", "a dog")]


def test_prompts_of_geneval_have_their_objects(tmp_path):
    path = written(tmp_path, "\n".join(map(json.dumps, OBJECTS)))
    prompts = read_prompts(path, "geneval")
    assert texts(prompts) == [("00000", "a photo of counting"), ("00001", "a photo of position")]
    assert [prompt.metadata for prompt in prompts] == OBJECTS


def test_prompts_of_dpg_have_their_questions(tmp_path):
    prompts = read_prompts(written(tmp_path, TABLE), "dpg")
    assert texts(prompts) == [("whoops22", 'A cat, said "meow",\non a mat.'), ("drawtext12", "A sign.")]
    assert [len(prompt.metadata["questions"]) for prompt in prompts] == [2, 1]
    assert prompts[0].metadata["questions"][1] == {
        "keywords": "",
        "proposition_id": "2",
        "dependency": "1",
        "question_natural_language": "On a mat, is it?",
    }


def test_prompts_of_dpg_may_be_a_folder(tmp_path):
    for name, text in {"b": "second\n", "a": "first"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "README.md").write_text("not one")
    assert texts(read_prompts(tmp_path, "dpg")) == [("a", "first"), ("b", "second")]
    (tmp_path / "c.txt").write_text("\n")
    with pytest.raises(ArtefactError, match=r"c\.txt, text: "):
        read_prompts(tmp_path, "dpg")


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("lines", "one\n\nthree\n", "prompts, line 2, text: .* at least 1 character"),
        ("lines", "", "prompts, line 1, text: "),
        ("lines", b"one\ntwo \xff\n", "prompts, line 2: not UTF-8; save"),
        (
            "geneval",
            '{"tag": "a", "prompt": "x"}\n{"tag": 1, "prompt": "x"}',
            "prompts, line 2: expected an object with",
        ),
        ("geneval", '{"tag": "a", "prompt": "x"}\n["x"]', "prompts, line 2: expected an object"),
        ("geneval", '{"tag": "a", "prompt": "x"}\na photo of x\n', "prompts, line 2: not valid JSON"),
        ("geneval", '{"tag": "a", "prompt": " "}', "prompts, line 1, text: "),
        ("geneval", '{"tag": "a", "prompt": "\\ud800"}', "prompts, line 1, text: "),
        ("dpg", "item_id,prompt\na,b\n", "prompts, line 1: no column text; is this DPG-Bench's"),
        ("dpg", "item_id,text\na,b\n\nc,d,e\n", "prompts, line 4: not as many cells"),
        ("dpg", "item_id,text\na,b\nc\n", "prompts, line 3: not as many cells"),
        ("dpg", "item_id,text\na,b\na,c\n", "prompts, line 3: another text .* item_id 'a'"),
        ("dpg", "item_id,text\na,b\n../../c,d\n", "prompts, line 3, name: "),
        ("dpg", 'item_id,text\na,"b\n', "prompts, line 2: not valid CSV"),
        ("dpg", "item_id,text\n", "prompts: no prompts"),
    ],
)
def test_errors_name_file_and_line(tmp_path, form, content, message):
    with pytest.raises(ArtefactError, match=message):
        read_prompts(written(tmp_path, content), form)


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "other").touch()
    with pytest.raises(ArtefactError, match=r"prompts: no such file; .* holds other"):
        read_prompts(tmp_path / "prompts", "lines")
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_prompts(tmp_path, "lines")
    with pytest.raises(ArtefactError, match="a pipe, a socket or a device"):
        read_prompts(Path("/dev/zero"), "lines")
