"""data/tokenizer.py: vocabularies, and the text that is read."""

import io

import pytest
import torch

from data.tokenizer import Tokenizer, load_corpus


def test_text_survives_a_round_trip():
    text = "\n naïve Ω\ttext, 漢字 🙂 <mask>\u2028end\r"
    tok = Tokenizer.from_text(text)
    ids = tok.encode(text)
    assert tok.decode(ids) == tok.decode(torch.tensor(ids)) == text
    assert len(ids) == len(text) and len(tok) == len(set(text))


def test_ids_follow_the_code_points_whatever_the_order_of_the_text():
    assert Tokenizer.from_text("cabac").encode("abc") == [0, 1, 2]
    assert Tokenizer.from_text("bca").state_dict() == Tokenizer.from_text("abcabc").state_dict()


def test_special_tokens_come_first():
    tok = Tokenizer.from_text("ba", special=["<mask>", "<pad>"])
    assert [tok["<mask>"], tok["<pad>"], tok["a"], tok["b"]] == [0, 1, 2, 3]
    assert len(tok) == 4
    assert tok.decode([2, 0, 3, 1]) == "a<mask>b<pad>"


def test_special_token_is_encoded_only_as_a_list_element():
    tok = Tokenizer.from_text("<mask>a", special=["<mask>"])
    assert tok.encode(["a", "<mask>"]) == [tok["a"], 0]
    assert tok.encode("a<mask>") == [tok[c] for c in "a<mask>"] and 0 not in tok.encode("a<mask>")


def test_symbols_between_spaces():
    tok = Tokenizer(["f1", "=", "+", "10"], special=["<end>"], sep=" ")
    assert tok.encode("10 + f1 = 10") == tok.encode(["10", "+", "f1", "=", "10"]) == [4, 3, 1, 2, 4]
    assert tok.decode([4, 3, 1, 2, 4, 0]) == "10 + f1 = 10 <end>"


@pytest.mark.parametrize("tok, text", [(Tokenizer.from_text("abc"), "abx"),
                                       (Tokenizer(["a", "b", "c"], sep=" "), "a x b"),
                                       (Tokenizer.from_text("abc"), ["a", "x"])])
def test_unknown_symbol_is_refused_by_name(tok, text):
    with pytest.raises(ValueError, match=r"'x' is not in the vocabulary of 3 names"):
        tok.encode(text)


@pytest.mark.parametrize("bad", [-1, 3, 99])
def test_unknown_id_is_refused_by_number(bad):
    with pytest.raises(ValueError, match=rf"id {bad} is outside the vocabulary of 3 names"):
        Tokenizer.from_text("abc").decode([0, bad])


@pytest.mark.parametrize("symbols, special, sep, message", [
    ("aba", (), "", r"'a' is twice"),
    ("ab", ("<end>", "<end>"), "", r"'<end>' is twice"),
    (("x", "<end>"), ("<end>",), " ", r"'<end>' is twice"),
    (("a", "bc"), (), "", r"'bc' is not a single character; set sep=' '"),
    (("a", ""), (), "", r"'' is not a single character"),
    (("a", "b c"), (), " ", r"'b c' is not a symbol without spaces"),
    (("a", "b\tc"), (), " ", r"is not a symbol without spaces"),
    (("a", ""), (), " ", r"'' is not a symbol"),
    (("a", "b"), (), ",", r"sep=',' must be")])
def test_vocabulary_that_cannot_be_inverted_is_refused(symbols, special, sep, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(symbols, special, sep)


@pytest.mark.parametrize("tok", [Tokenizer.from_text("héllo\n", special=["<mask>"]),
                                 Tokenizer(["10", "="], special=["<pad>", "<end>"], sep=" ")])
def test_state_survives_a_checkpoint_that_is_loaded_without_code(tok):
    file = io.BytesIO()
    torch.save({"tokenizer": tok.state_dict()}, file)
    file.seek(0)
    copy = Tokenizer.from_state(torch.load(file, weights_only=True)["tokenizer"])
    ids = list(range(len(tok)))
    assert (copy.names, copy.special, copy.sep) == (tok.names, tok.special, tok.sep)
    assert copy.decode(ids) == tok.decode(ids)
    assert copy.encode(list(copy.names)) == ids


def test_default_text_is_long_prose_and_always_the_same():
    text = load_corpus()
    assert text == load_corpus("") == load_corpus(None)
    assert len(text) > 400_000 and text.endswith("\n")
    assert all(c.isprintable() or c == "\n" for c in text)
    letters = sum(c.isalpha() or c == " " for c in text)
    assert letters > 0.8 * len(text) and len(set(text)) < 200
    assert text.index("The \"assert\" statement") < text.index("The \"with\" statement")


def test_file_is_read_as_it_stands_but_for_windows_line_ends(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("  Ünïcode\r\nline two\n\n".encode())
    assert load_corpus(path) == load_corpus(str(path)) == "  Ünïcode\nline two\n\n"


@pytest.mark.parametrize("content, message", [
    (None, r"cannot be read \(No such file.*\)"),
    ("directory", r"cannot be read \(.+\)"),
    (b"", r"is empty; give a text"),
    (b" \n\t\r\n ", r"is empty; give a text"),
    ("naïve".encode("latin-1"), r"is not UTF-8 \(byte 2\); convert it"),
    ("text".encode("utf-16"), r"is not UTF-8 \(byte 0\); convert it")])
def test_bad_file_is_refused_in_one_line_that_names_it(content, message, tmp_path):
    path = tmp_path / "text.txt"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_corpus(path)
    assert str(error.value).startswith(f"corpus={path} ") and "\n" not in str(error.value)


@pytest.mark.parametrize("tok, text", [(Tokenizer("ab", special=["_"]), "a_b"),
                                       (Tokenizer("ab", ["<end>"], " "), "a <end>")])
def test_special_token_in_a_string_is_refused(tok, text):
    with pytest.raises(ValueError, match="special token"):
        tok.encode(text)
