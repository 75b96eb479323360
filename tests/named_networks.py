"""Networks by name, of timm, torchvision and transformers: what `describe` is tried on."""

from __future__ import annotations

TIMM = {
    **dict.fromkeys((
        "resnet18", "resnet50d", "seresnet50", "resnext26ts", "regnety_002", "efficientnet_b0",
        "tf_efficientnet_lite0", "mobilenetv3_small_100", "mobilenetv4_conv_small", "ghostnet_100",
        "densenet121", "dla34", "hrnet_w18_small", "res2net50_26w_4s", "vgg11", "convnext_atto",
        "convnextv2_atto", "cspresnet50", "darknet53", "repvgg_a0", "mobileone_s0", "lcnet_050", "tinynet_e",
        "skresnet18", "nf_regnet_b0", "ecaresnet26t", "poolformer_s12", "edgenext_xx_small", "resnetv2_50",
        "xception41", "convmixer_768_32", "inception_next_atto"
    ), 64),
    **dict.fromkeys((
        "vit_tiny_patch16_224", "deit_tiny_patch16_224", "mixer_s32_224", "resmlp_12_224",
        "swin_tiny_patch4_window7_224", "beit_base_patch16_224", "pit_ti_224", "cait_xxs24_224",
        "visformer_tiny"
    ), 224),
}  # fmt: skip
TORCHVISION = {
    **dict.fromkeys((
        "alexnet", "vgg11_bn", "resnet34", "resnext50_32x4d", "wide_resnet50_2", "squeezenet1_0", "densenet121",
        "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "mnasnet0_5",
        "shufflenet_v2_x0_5", "convnext_tiny", "swin_t"
    ), 64),
}  # fmt: skip
TRANSFORMERS = [
    "ViTModel", "DeiTModel", "BeitModel", "Dinov2Model", "ViTMAEModel", "ConvNextModel", "ConvNextV2Model",
    "ResNetModel", "RegNetModel", "MobileNetV1Model", "MobileNetV2Model", "PoolFormerModel", "SegformerModel",
    "BertModel", "RobertaModel", "ElectraModel", "DistilBertModel", "GPT2Model", "OPTModel", "LlamaModel",
    "MistralModel", "Qwen2Model", "T5EncoderModel", "BartModel", "Wav2Vec2Model", "CLIPTextModel",
]  # fmt: skip
