"""The attention and the scans of other libraries' networks: what is said of them, and what becomes of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nearfold import Rule, convert, describe
from nearfold._torchvision import load

load("torchvision")  # before transformers and timm, which import it
tf = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32,
}  # fmt: skip
IMAGES = SIZES | {"image_size": 32, "patch_size": 8}
TEXT = SIZES | {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = TEXT | {"num_key_value_heads": 2}
DINO = {name: IMAGES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")} | {
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
BART = {
    "vocab_size": 50, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
ROW, CAUSAL = "all | row | softmax(heads=4)", "all | causal | softmax(heads=4)"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network: how it is made, the operations of its attention, and why others are not said or not replaced."""

    model: str
    config: str
    sizes: dict[str, Any]
    said: tuple[str, ...] = (ROW,)
    unsaid: str = ""
    refused: str = ""
    reads: str = "images"
    quick: bool = False

    def make(self, implementation: str = "sdpa") -> nn.Module:
        torch.manual_seed(0)
        model = getattr(tf, self.model)(getattr(tf, self.config)(**self.sizes)).eval()
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p, 0, 0.2) if p.dim() > 1 else p.data.add_(0.05 * torch.randn_like(p))
        if implementation == "eager":
            model.set_attn_implementation(implementation)
        return model

    def inputs(self, padding: str) -> dict[str, Tensor]:
        torch.manual_seed(1)
        mask = torch.ones(2, 9, dtype=torch.long)
        if padding == "right":
            mask[0, 6:] = 0
        elif padding == "left":
            mask[0, :3] = 0
        if self.reads == "images":
            return {"pixel_values": torch.randn(2, 3, 32, 32)}
        if self.reads == "sound":
            long = torch.ones(2, 101, dtype=torch.long)
            long[0, 60:] = 1 if padding == "none" else 0
            return {"input_values": torch.randn(2, 101), "attention_mask": long}
        given = {"input_ids": torch.randint(3, 50, (2, 9))} | ({} if padding == "none" else {"attention_mask": mask})
        return given | ({"decoder_input_ids": torch.randint(3, 50, (2, 7))} if self.reads == "pairs" else {})


def text(model: str, config: str, sizes: dict[str, Any] = TEXT, **more: Any) -> Case:
    return Case(model, config, sizes, **({"reads": "text"} | more))


CROSS = "cross-attention: keys and values of another input"
CASES: dict[str, Case] = {
    "vit": Case("ViTModel", "ViTConfig", IMAGES),
    "deit": Case("DeiTModel", "DeiTConfig", IMAGES, quick=True),
    "dinov2": Case("Dinov2Model", "Dinov2Config", DINO),
    "dinov2 with registers": Case("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO),
    "dinov3": Case("DINOv3ViTModel", "DINOv3ViTConfig", IMAGES, (), unsaid="rotary positions of a kind"),
    "vitmae": Case("ViTMAEModel", "ViTMAEConfig", IMAGES),
    "clip vision": Case("CLIPVisionModel", "CLIPVisionConfig", IMAGES),
    "clip text": text("CLIPTextModel", "CLIPTextConfig", said=(CAUSAL,)),
    "siglip vision": Case(
        "SiglipVisionModel", "SiglipVisionConfig", IMAGES, (ROW, "all(cross) | row | softmax(heads=4)"), refused=CROSS
    ),
    "siglip text": text("SiglipTextModel", "SiglipTextConfig"),
    "beit": Case("BeitModel", "BeitConfig", IMAGES),
    "beit with a bias": Case(
        "BeitModel", "BeitConfig", IMAGES | {"use_relative_position_bias": True}, (), unsaid="entries of its own"
    ),
    "swin": Case(
        "SwinModel", "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2], "num_heads": [3], "window_size": 4},
        ("block(4, scaled(bias=table)) | box | softmax(heads=3)",
         "block(4, scaled(bias=table), shift=2) | box | softmax(heads=3)"),
    ),
    "segformer": Case(
        "SegformerModel", "SegformerConfig",
        {"hidden_sizes": [8, 8, 8, 24], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 4]},
        unsaid="no word for its sequence_reduction.layer_norm (LayerNorm)",
    ),
    "wav2vec2": Case(
        "Wav2Vec2Model", "Wav2Vec2Config",
        SIZES | {"num_feat_extract_layers": 2, "conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2],
                 "num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 4},
        reads="sound",
    ),
    "bert": text("BertModel", "BertConfig", quick=True),
    "bert as a decoder": text(
        "BertModel", "BertConfig", TEXT | {"is_decoder": True, "add_cross_attention": True},
        said=(CAUSAL, "all(cross) | row | softmax(heads=4)"), refused=CROSS,
    ),
    "roberta": text("RobertaModel", "RobertaConfig"),
    "distilbert": text(
        "DistilBertModel", "DistilBertConfig",
        {"vocab_size": 50, "dim": 24, "n_layers": 1, "n_heads": 4, "hidden_dim": 32},
    ),
    "albert": text("AlbertModel", "AlbertConfig", TEXT | {"embedding_size": 16}),
    "electra": text("ElectraModel", "ElectraConfig"),
    "gpt2": text(
        "GPT2Model", "GPT2Config",
        {"vocab_size": 50, "n_embd": 24, "n_layer": 1, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
        said=(CAUSAL,),
    ),
    "gpt2 scaled by layer": text(
        "GPT2Model", "GPT2Config",
        {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2,
         "scale_attn_by_inverse_layer_idx": True},
        said=(CAUSAL, "all | causal | softmax(heads=4, scale=0.5)"),
    ),
    "gpt neo": text(
        "GPTNeoModel", "GPTNeoConfig",
        {"vocab_size": 50, "hidden_size": 24, "num_layers": 1, "num_heads": 4, "attention_types": [[["local"], 1]],
         "bos_token_id": 1, "eos_token_id": 2},
        said=(), unsaid="no word for its bias",
    ),
    "opt": text(
        "OPTModel", "OPTConfig",
        {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 32,
         "word_embed_proj_dim": 24},
        said=(CAUSAL,),
    ),
    "llama": text(
        "LlamaModel", "LlamaConfig", GROUPED, said=("all(scaled(rotary)) | causal | softmax(heads=4, kv=2)",),
        quick=True,
    ),
    "llama 3": text(
        "LlamaModel", "LlamaConfig", GROUPED | {"rope_parameters": LLAMA3}, said=(), unsaid="of the type llama3"
    ),
    "mistral": text(
        "MistralModel", "MistralConfig", GROUPED | {"sliding_window": 4},
        said=("window(4, scaled(rotary)) | causal | softmax(heads=4, kv=2)",),
    ),
    "qwen2": text(
        "Qwen2Model", "Qwen2Config", GROUPED | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        said=("all(scaled(rotary=1000000.0)) | causal | softmax(heads=4, kv=2)",),
    ),
    "qwen3": text(
        "Qwen3Model", "Qwen3Config", GROUPED | {"head_dim": 6}, said=(),
        unsaid="no word for its k_norm (Qwen3RMSNorm), q_norm",
    ),
    "gemma2": text("Gemma2Model", "Gemma2Config", GROUPED | {"head_dim": 6}, said=(), unsaid="scores that are capped"),
    "phi": text(
        "PhiModel", "PhiConfig", TEXT | {"num_attention_heads": 2}, said=(), unsaid="in 0.5 of each head's features"
    ),
    "t5": text(
        "T5EncoderModel", "T5Config",
        {"vocab_size": 50, "d_model": 24, "d_kv": 6, "num_layers": 1, "num_heads": 4, "d_ff": 32},
        said=(), unsaid="a bias of the relative positions",
    ),
    "bart": text(
        "BartModel", "BartConfig", BART, said=(ROW, CAUSAL, "all(cross) | row | softmax(heads=4)"), refused=CROSS,
        reads="pairs",
    ),
}  # fmt: skip
PARAMS = [pytest.param(name, id=name, marks=[] if c.quick else [pytest.mark.slow]) for name, c in CASES.items()]
REPLACED = [p for p in PARAMS if CASES[p.values[0]].said]


def attentions(model: nn.Module) -> tuple[set[str], set[str]]:
    """Operations that weigh by a softmax, and why attention layers are not known."""
    found = describe(model)
    return (
        {row.notation for row in found.rows if "softmax" in row.notation},
        {s.reason for s in found.unknown if s.kind.endswith("Attention")},
    )


@pytest.mark.parametrize("name", PARAMS)
def test_what_is_said_of_a_network(name):
    case = CASES[name]
    said, unknown = attentions(case.make())
    assert said == set(case.said)
    assert bool(unknown) == bool(case.unsaid) and all(case.unsaid in reason for reason in unknown)


def nearest(site: Any) -> str:
    """The same attention, to the 64 best keys of those that it sees."""
    op = site.operation
    if op.path.word == "block":
        return str(op)
    return f"nearest(64, {op.path.similarity}) | {'causal' if op.shape.word == 'causal' else 'ranked'} | {op.weight}"


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    dtype = next(model.parameters()).dtype
    torch.manual_seed(2)  # MAE draws which patches it sees
    with torch.no_grad():
        return model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})[0]


def paddings(case: Case) -> tuple[str, ...]:
    return (
        ("none",)
        if case.reads == "images"
        else ("none", "right")
        if case.reads == "sound"
        else ("none", "right", "left")
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", REPLACED)
def test_replaced_attention_computes_the_same(name, implementation):
    """At every position, without padding and with padding on either side, in float32 and float64."""
    case = CASES[name]
    for dtype, to in ((torch.float32, "{self}"), (torch.float32, nearest), (torch.float64, "{self}")):
        model = case.make(implementation).to(dtype)
        inputs = {padding: case.inputs(padding) for padding in paddings(case)}
        before = {padding: outputs(model, given) for padding, given in inputs.items()}
        report = convert(model, Rule(to, kind="attention"))
        refused = {row.reason for row in report.rows if row.status == "refused" and row.layer.endswith("Attention")}
        expected = [reason for reason in (case.refused, case.unsaid) if reason]
        assert len(report.replaced) and bool(refused) == bool(expected)
        assert all(any(reason in r for reason in expected) for r in refused)
        # in eager attention, and for rotary angles, transformers computes in float32 whatever the model is in
        single = implementation == "eager" or "rotary" in case.said[0]
        limit = 1e-12 if dtype == torch.float64 and not single else 1e-5
        for padding, y in before.items():
            after = outputs(model, inputs[padding])
            lost = y.isnan()  # in float64 transformers' eager attention makes NaN of padding on the left
            assert not lost.any() or (dtype, implementation, padding) == (torch.float64, "eager", "left")
            difference = (after - y).masked_fill(lost, 0).abs().max().item()
            print(
                f"{name}, {implementation}, {dtype}, {to if to == '{self}' else 'nearest'}, {padding}: {difference:.1e}"
            )
            assert difference < limit, (padding, dtype, to)


@pytest.mark.parametrize("name", [p for p in PARAMS if p.values[0] in ("bert", "gpt2", "llama", "mistral", "opt")])
def test_gradients_are_the_same_in_training(name):
    case = CASES[name]
    given = case.inputs("right")
    grads = []
    for replace in (False, True):
        model = case.make().train()
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
            for rate in ("attention_dropout", "dropout"):
                if isinstance(getattr(m, rate, None), float):
                    setattr(m, rate, 0.0)
        if replace:
            convert(model, Rule("{self}", kind="attention"))
        y = model(**given)[0]
        (y * given["attention_mask"][..., None]).square().mean().backward()
        grads.append(model.get_input_embeddings().weight.grad)
    assert grads[0].abs().max() > 0 and (grads[0] - grads[1]).abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mistral", "bart"])
def test_generation_goes_on_from_what_was_kept(name, implementation):
    case = CASES[name]
    models = {"BartModel": "BartForConditionalGeneration", "GPT2Model": "GPT2LMHeadModel"}
    made = models.get(case.model, case.model.replace("Model", "ForCausalLM"))
    sizes = case.sizes | {"eos_token_id": None, "pad_token_id": 0, "forced_eos_token_id": None}
    model = Case(made, case.config, sizes, reads="text").make(implementation)
    given = Case("", "", {}, reads="text").inputs("left")
    ways = [{}, {"num_beams": 3}, {"attention_mask": given["attention_mask"]}]
    options = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0}
    before = [model.generate(given["input_ids"], **options, **way) for way in ways]
    convert(model, Rule("{self}", kind="attention"))
    for way, tokens in zip(ways, before, strict=True):
        assert torch.equal(model.generate(given["input_ids"], **options, **way), tokens), way


@pytest.mark.slow
def test_positions_that_are_added_to_queries_and_keys():
    """DETR: its words are said with a note, and it is kept; so is attention to another input."""
    backbone = tf.ResNetConfig(hidden_sizes=[8] * 4, depths=[1] * 4, embedding_size=8, out_features=["stage4"])
    sizes = {name: value for name, value in BART.items() if name != "vocab_size"}
    model = tf.DetrModel(tf.DetrConfig(use_timm_backbone=False, backbone_config=backbone, **sizes)).eval()
    rows = {row.name: row for row in describe(model).rows if "softmax" in row.notation}
    names = ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn")
    assert [rows[name].notation for name in names] == [ROW, ROW, "all(cross) | row | softmax(heads=4)"]
    assert all("plus the positions that the caller gives" in rows[name].note for name in names)
    rules = [Rule("{self}", kind="attention"), Rule("{self}", kind="conv")]
    reasons = {row.name: row.reason for row in convert(model, rules).rows if row.status == "refused"}
    assert "positions that its caller gives are added" in reasons[names[0]] and reasons[names[2]] == CROSS
    assert "positions that its caller gives are added" in reasons[names[1]]


# --- calls that are refused


def converted(name: str, to: Callable[..., Any] | str = "{self}", implementation: str = "sdpa") -> nn.Module:
    model = CASES[name].make(implementation)
    assert convert(model, Rule(to, kind="attention")).replaced
    return model


def test_attention_weights_are_refused():
    model = converted("bert", implementation="eager")
    with pytest.raises(ValueError, match="output_attentions"):
        model(**CASES["bert"].inputs("none"), output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        model(**CASES["bert"].inputs("none"))


def test_a_causal_layer_stays_causal():
    report = convert(
        CASES["llama"].make(), [Rule("nearest(8, scaled) | ranked | softmax(heads={heads})", kind="attention")]
    )
    (row,) = [row for row in report.rows if row.layer == "LlamaAttention"]
    assert row.status == "refused" and "write the shape causal" in row.reason


def test_masks_that_let_a_query_read_more_are_refused():
    model, given = converted("llama"), CASES["llama"].inputs("none")
    with pytest.raises(ValueError, match="lets a query read more"):
        model(**given, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))


def test_positions_that_are_not_one_apart_are_refused():
    model, given = converted("llama"), CASES["llama"].inputs("none")
    ids = torch.arange(9).expand(2, 9)
    assert torch.allclose(model(**given, position_ids=ids + 5)[0], model(**given)[0], atol=1e-5)
    with pytest.raises(ValueError, match="positions one apart"):
        model(**given, position_ids=2 * ids)


def test_a_bias_in_the_place_of_a_mask_is_refused():
    model = converted("bert")
    layer = model.encoder.layer[0].attention
    with pytest.raises(ValueError, match="adds numbers to the scores"):
        layer(torch.randn(2, 9, 24), torch.randn(2, 1, 9, 9))
    with pytest.raises(ValueError, match="encoder_hidden_states was given"):
        layer(torch.randn(2, 9, 24), encoder_hidden_states=torch.randn(2, 5, 24))


def test_padding_reaches_neighbours_by_rank():
    """Attention to the 3 best keys chooses among those that are no padding."""
    model, given = (
        converted("bert", "nearest(3, scaled) | ranked | softmax(heads={heads})"),
        CASES["bert"].inputs("right"),
    )
    whole = model(**given)[0][:1, :6]
    alone = model(input_ids=given["input_ids"][:1, :6])[0]
    assert (whole - alone).abs().max() < 1e-5
