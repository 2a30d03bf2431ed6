"""T5 and a decoder-only model of transformers as text encoders; `.ci/run` installs the extra `text` for these alone."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2Model, T5Config, T5EncoderModel

from vtp.artefact import ArtefactError
from vtp.config import ConfigError
from vtp.models.text_encoder import TransformersText, load_text_encoder

WORDS = ["<pad>", "</s>", "<unk>", "a", "frog", "left", "of", "dog"]
CAPTIONS = ["a frog", "a frog left of a dog"]


def words():
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def t5():
    return T5EncoderModel(T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def qwen():
    config = Qwen2Config(vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config.num_key_value_heads = 2
    return Qwen2Model(config)


@pytest.fixture(params=[t5, qwen])
def folder(request, tmp_path):
    torch.manual_seed(0)
    request.param().save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def config_of(**changes):
    return TransformersText(**{"name": "transformers", "length": 8, "width": 16, "layer": -1} | changes)


def test_tokens_are_those_of_the_model_alone_and_padding_is_masked(folder):
    encoder = load_text_encoder(config_of(), folder, weights=folder)
    features, mask = encoder(encoder.tokenize(CAPTIONS))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row, caption in enumerate(CAPTIONS):
        ids = tokenizer(caption, return_tensors="pt")["input_ids"]
        assert 1 < ids.shape[1] < 8  # so that there is padding
        alone = encoder.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(features[row][mask[row]], alone, atol=1e-5, rtol=1e-4)


def test_an_earlier_layer_may_be_read(folder):
    last, earlier = (load_text_encoder(config_of(layer=layer), folder, weights=folder) for layer in (-1, -2))
    tokens = last.tokenize(CAPTIONS)
    hidden = last.model(input_ids=tokens.ids, attention_mask=tokens.mask.long(), output_hidden_states=True)
    torch.testing.assert_close(earlier(tokens).features, hidden.hidden_states[-2])
    assert last.digest != earlier.digest


def test_long_captions_are_cut(folder):
    encoder = load_text_encoder(config_of(length=4), folder, weights=folder)
    assert encoder.tokenize(CAPTIONS).ids.shape == (2, 4)


def test_what_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="its features are 16 wide"):
        load_text_encoder(config_of(width=32), folder, weights=folder)
    with pytest.raises(ArtefactError, match=r"no config\.json"):
        load_text_encoder(config_of(), tmp_path, weights=tmp_path)


def test_pickles_and_code_of_a_folder_are_left_alone(folder):
    """Weights in a pickle are no weights; another file changes the digest."""
    before = load_text_encoder(config_of(), folder, weights=folder).digest
    tensors = folder / "model.safetensors"
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert load_text_encoder(config_of(), folder, weights=folder).digest == before
    tensors.unlink()
    with pytest.raises(ArtefactError, match="cannot load it"):
        load_text_encoder(config_of(), folder, weights=folder)
