"""What a run leaves, and what the next can start from."""

import pytest
import torch
from objectives.test_pretrain import ALONE, START, batch_of, config_of, objective_of
from safetensors.torch import load_file

from vtp.artefact import ArtefactError
from vtp.models.tokenizer import VisualTokenizer, save_tokenizer
from vtp.objectives.pretrain_state import export_tokenizer, load_pretrain_state, save_pretrain_state
from vtp.training.fit import state_of
from vtp.training.optim import build_optimizer
from vtp.training.update import Update


def trained(config, steps=2):
    """An objective that has moved, and the state of its optimiser."""
    objective = objective_of(config)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    optimizer = build_optimizer(objective.phases()["model"], config.optim)
    update = Update("model", optimizer, config.optim, ())
    for step in range(steps):
        update.apply(objective.terms("model", [batch_of(config, step, ALONE)], START), START)
        objective.after_step(START)
    tensors = state_of(objective, {"model": optimizer})
    return objective, {name: tensor for name, tensor in tensors.items() if not name.startswith("objective/")}


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_training_state_is_complete(tmp_path):
    config = config_of()
    objective, optimizer = trained(config)
    save_pretrain_state(objective, optimizer, tmp_path / "state")
    fresh = objective_of(config)
    moments = load_pretrain_state(fresh, tmp_path / "state")
    assert equal(fresh, objective)
    assert moments.keys() == optimizer.keys()
    assert all(torch.equal(moments[name], optimizer[name]) for name in moments)
    again = objective_of(config)
    load_pretrain_state(again, tmp_path / "state")
    save_pretrain_state(again, moments, tmp_path / "again")
    for name in ("config.json", "model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "state" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_tokenizer_gives_student_and_teacher(tmp_path):
    """Official releases hold neither heads nor teacher."""
    config = config_of()
    objective, _ = trained(config)
    export_tokenizer(objective, tmp_path / "tokenizer", weights="student")
    fresh = objective_of(config)
    heads = [p.clone() for p in fresh.ssl.heads.parameters()]
    assert load_pretrain_state(fresh, tmp_path / "tokenizer") == {}
    assert equal(fresh.tokenizer, objective.tokenizer)
    assert equal(fresh.ssl.teacher.trunk, objective.tokenizer.trunk)
    assert all(torch.equal(a, b) for a, b in zip(heads, fresh.ssl.heads.parameters(), strict=True))
    assert equal(fresh.ssl.teacher.heads, fresh.ssl.heads)
    assert not any(p.requires_grad for p in fresh.ssl.teacher.parameters())


def test_absent_parts_start_afresh(tmp_path):
    """An autoencoder's tokenizer begins a joint run: its text tower is new."""
    autoencoder = config_of({"objective": {"weights": {"clip": 0.0, "ssl": 0.0}}})
    objective, _ = trained(autoencoder)
    export_tokenizer(objective, tmp_path / "tokenizer", weights="student")
    joint = objective_of(config_of())
    text = [p.clone() for p in joint.tokenizer.text.parameters()]
    load_pretrain_state(joint, tmp_path / "tokenizer")
    assert equal(joint.tokenizer.pixel_decoder, objective.tokenizer.pixel_decoder)
    assert all(torch.equal(a, b) for a, b in zip(text, joint.tokenizer.text.parameters(), strict=True))


def test_an_encoder_without_decoder_begins_a_run(tmp_path):
    """Its decoder is new; a logit scale of shape [1] is kept so, and learns."""
    config = config_of({"tokenizer": {"nonscalar_logit_scale": True}}, new=True)
    objective, _ = trained(config)
    encoder = objective.tokenizer.config.model_copy(update={"decoder": None})
    weights = objective.tokenizer.state_dict()
    save_tokenizer(tmp_path / "encoder", encoder, {k: v for k, v in weights.items() if not k.startswith("pixel_")})
    fresh = objective_of(config)
    decoder = [p.clone() for p in fresh.tokenizer.pixel_decoder.parameters()]
    load_pretrain_state(fresh, tmp_path / "encoder")
    assert equal(fresh.tokenizer.trunk, objective.tokenizer.trunk)
    assert all(torch.equal(a, b) for a, b in zip(decoder, fresh.tokenizer.pixel_decoder.parameters(), strict=True))
    assert torch.equal(fresh.tokenizer.logit_scale, objective.tokenizer.logit_scale)
    assert fresh.tokenizer.logit_scale.shape == (1,)
    before, _ = trained(config, steps=0)
    assert not torch.equal(objective.tokenizer.logit_scale, before.tokenizer.logit_scale)


def test_the_teacher_can_be_exported(tmp_path):
    objective, _ = trained(config_of())
    for weights in ("student", "teacher"):
        export_tokenizer(objective, tmp_path / weights, weights=weights)
    student, teacher = (VisualTokenizer.from_pretrained(tmp_path / name) for name in ("student", "teacher"))
    assert equal(student.trunk, objective.tokenizer.trunk)
    assert equal(teacher.trunk, objective.ssl.teacher.trunk)
    assert equal(teacher.visual_proj, objective.ssl.teacher.visual_proj)
    assert equal(teacher.pixel_decoder, student.pixel_decoder)
    assert (
        load_file(tmp_path / "teacher/model.safetensors").keys()
        == load_file(tmp_path / "student/model.safetensors").keys()
    )


def test_what_does_not_fit_is_named(tmp_path):
    objective, optimizer = trained(config_of())
    export_tokenizer(objective, tmp_path / "tokenizer", weights="student")
    save_pretrain_state(objective, optimizer, tmp_path / "state")
    deeper = objective_of(config_of({"tokenizer": {"vision": {"depth": 3}}}))
    with pytest.raises(ArtefactError, match=r"vision\.depth is 2 there"):
        load_pretrain_state(deeper, tmp_path / "tokenizer")
    wider = {"hidden_dim": 16, "bottleneck_dim": 8, "prototypes": 32, "weight_norm": True, "prototype_init": "linear"}
    other = objective_of(config_of({"objective": {"ssl": {"head": wider}}}))
    with pytest.raises(ArtefactError, match=r"heads\.dino.* begin from a model of the same architecture"):
        load_pretrain_state(other, tmp_path / "state")
    with pytest.raises(ArtefactError, match="no such file"):
        load_pretrain_state(deeper, tmp_path / "nothing")
