"""One network of every module of timm, the smallest that stands for it, and more of modules that hold several architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.zoo.row import Row, images, row

# module of timm -> model, image size, options of the constructor (large towers are cut to three blocks)
_MODULES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", 64, {"depth": 3, "img_size": 64}),
    "byoanet": ("eca_botnext26ts_256", 64, {"img_size": 64}),
    "byobnet": ("mobileone_s1", 64, {}),
    "cait": ("cait_xxs24_224", 64, {"img_size": 64}),
    "coat": ("coat_tiny", 64, {"img_size": 64}),
    "convit": ("convit_tiny", 64, {"img_size": 64}),
    "convmixer": ("convmixer_768_32", 64, {}),
    "convnext": ("convnext_atto", 64, {}),
    "cpubone": ("cpubone_nano", 64, {}),
    "crossvit": ("crossvit_tiny_240", 240, {}),
    "csatv2": ("csatv2", 128, {}),
    "cspnet": ("cs3darknet_focus_s", 64, {}),
    "cspnext": ("cspnext_tiny", 64, {}),
    "davit": ("davit_tiny", 64, {}),
    "deepseek_vit": ("deepseek_vit_412m", 56, {"depth": 3}),
    "deit": ("deit3_small_patch16_224", 64, {"img_size": 64}),
    "densenet": ("densenet121", 64, {}),
    "dla": ("dla46x_c", 64, {}),
    "dpn": ("dpn48b", 64, {}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "efficientformer_v2": ("efficientformerv2_s0", 64, {"img_size": 64}),
    "efficientnet": ("efficientnet_b0", 64, {}),
    "efficientvim": ("efficientvim_m1", 64, {}),
    "efficientvit_mit": ("efficientvit_b0", 64, {}),
    "efficientvit_msra": ("efficientvit_m0", 128, {"img_size": 128}),
    "eva": ("eva02_tiny_patch14_224", 56, {"img_size": 56}),
    "fasternet": ("fasternet_t0", 64, {}),
    "fastvit": ("fastvit_t8", 64, {}),
    "focalnet": ("focalnet_tiny_srf", 64, {}),
    "gcvit": ("gcvit_xxtiny", 64, {"img_size": 64}),
    "gemma4_vit": ("gemma4_vit_167m", 64, {"depth": 3}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "hardcorenas": ("hardcorenas_b", 64, {}),
    "hgnet": ("hgnetv2_b0", 64, {}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": 64}),
    "hieradet_sam2": ("hieradet_small", 64, {}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "iformer": ("iformer_t", 64, {}),
    "inception_next": ("inception_next_atto", 64, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 96, {}),
    "inception_v3": ("inception_v3", 96, {}),
    "inception_v4": ("inception_v4", 96, {}),
    "lcnetv2": ("lcnetv2_small", 64, {}),
    "levit": ("levit_128s", 64, {"img_size": 64}),
    "lowformer": ("lowformer_b0", 64, {}),
    "mambaout": ("mambaout_femto", 64, {}),
    "maxxvit": ("maxvit_rmlp_pico_rw_256", 64, {"img_size": 64}),
    "metaformer": ("poolformer_s12", 64, {}),
    "mlp_mixer": ("mixer_s16_224", 64, {"img_size": 64}),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}),
    "mobilenetv5": ("mobilenetv5_base", 64, {}),
    "mobilevit": ("mobilevit_xxs", 128, {}),
    "mvitv2": ("mvitv2_tiny", 64, {"img_size": 64}),
    "naflexvit": ("naflexvit_base_patch16_gap", 64, {"depth": 3}),
    "nasnet": ("nasnetalarge", 64, {}),
    "nest": ("nest_tiny", 64, {"img_size": 64}),
    "nextvit": ("nextvit_small", 64, {}),
    "nfnet": ("nf_regnet_b0", 64, {}),
    "pit": ("pit_ti_224", 64, {"img_size": 64}),
    "pnasnet": ("pnasnet5large", 64, {}),
    "pvt_v2": ("pvt_v2_b0", 64, {}),
    "qwen3_vit": ("qwen3_vit_88m", 64, {"depth": 3}),
    "rdnet": ("rdnet_tiny", 64, {}),
    "regnet": ("regnetx_002", 64, {}),
    "repghost": ("repghostnet_050", 64, {}),
    "repvit": ("repvit_m1", 64, {}),
    "res2net": ("res2next50", 64, {}),
    "resnest": ("resnest14d", 64, {}),
    "resnet": ("resnet18", 64, {}),
    "resnetv2": ("resnetv2_18", 64, {}),
    "rexnet": ("rexnet_100", 64, {}),
    "selecsls": ("selecsls42", 64, {}),
    "senet": ("legacy_seresnet18", 64, {}),
    "sequencer": ("sequencer2d_s", 64, {"img_size": 64}),
    "shvit": ("shvit_s1", 64, {}),
    "sknet": ("skresnet18", 64, {}),
    "starnet": ("starnet_s050", 64, {}),
    "swiftformer": ("swiftformer_xs", 64, {"img_size": 64}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 112, {"img_size": 112}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 128, {"img_size": 128}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 64, {"img_size": 64}),
    "tiny_vit": ("tiny_vit_5m_224", 64, {}),
    "tnt": ("tnt_s_legacy_patch16_224", 64, {"img_size": 64}),
    "tresnet": ("tresnet_m", 64, {}),
    "twins": ("twins_svt_small", 64, {"img_size": 64}),
    "vgg": ("vgg11", 64, {}),
    "visformer": ("visformer_tiny", 64, {"img_size": 64}),
    "vision_transformer": ("vit_tiny_patch16_224", 64, {"img_size": 64}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 64, {"img_size": 64}),
    "vision_transformer_relpos": ("vit_relpos_small_patch16_224", 64, {"img_size": 64}),
    "vision_transformer_sam": ("samvit_base_patch16_224", 64, {"depth": 3, "img_size": 64}),
    "vitamin": ("vitamin_small_224", 64, {"img_size": 64}),
    "volo": ("volo_d1_224", 64, {"img_size": 64}),
    "vovnet": ("ese_vovnet19b_slim_dw", 64, {}),
    "xception": ("legacy_xception", 64, {}),
    "xception_aligned": ("xception41p", 64, {}),
    "xcit": ("xcit_nano_12_p8_224", 64, {"img_size": 64}),
}

# model -> image size, options
_MORE: dict[str, tuple[int, dict[str, Any]]] = {
    "lambda_resnet26t": (64, {}),
    "eca_halonext26ts": (256, {}),
    "repvgg_a0": (64, {}),
    "gernet_s": (64, {}),
    "gcresnext26ts": (64, {}),
    "coatnet_rmlp_nano_rw_224": (64, {"img_size": 64}),
    "crossvit_9_dagger_240": (240, {}),
    "coat_lite_tiny": (64, {"img_size": 64}),
    "deit_tiny_distilled_patch16_224": (64, {"img_size": 64}),
    "tf_efficientnetv2_b0": (64, {}),
    "mixnet_s": (64, {}),
    "efficientnet_lite0": (64, {}),
    "fbnetc_100": (64, {}),
    "tinynet_e": (64, {}),
    "gmlp_ti16_224": (64, {"img_size": 64}),
    "gmixer_12_224": (64, {"img_size": 64}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "mobilenetv4_conv_small_035": (64, {}),
    "mobilenetv4_hybrid_medium": (64, {}),
    "lcnet_035": (64, {}),
    "fbnetv3_b": (64, {}),
    "caformer_s18": (64, {}),
    "convformer_s18": (64, {}),
    "mobilevitv2_050": (128, {}),
    "nfnet_l0": (64, {}),
    "dm_nfnet_f0": (64, {}),
    "eca_nfnet_l0": (64, {}),
    "levit_conv_128s": (64, {"img_size": 64}),
    "regnety_002": (64, {}),
    "regnetz_005": (64, {}),
    "resnet10t": (64, {}),
    "resnext50_32x4d": (64, {}),
    "ecaresnet26t": (64, {}),
    "seresnet50": (64, {}),
    "resnetblur50": (64, {}),
    "resnetaa50": (64, {}),
    "resnetrs50": (64, {}),
    "vit_medium_patch16_reg4_gap_256": (64, {"img_size": 64}),
    "vit_tiny_patch16_dinov3_qkvb": (64, {"img_size": 64}),
    "swin_s3_tiny_224": (112, {"img_size": 112}),
    "twins_pcpvt_small": (64, {"img_size": 64}),
    "vovnet39a": (64, {}),
    "densenetblur121d": (64, {}),
    "convnextv2_atto": (64, {}),
    "ghostnetv2_100": (64, {}),
    "ghostnetv3_050": (64, {}),
    "dla60x_c": (64, {}),
    "hgnet_tiny": (64, {}),
    "darknet53": (64, {}),
    "edgenext_small": (64, {}),
    "vit_srelpos_small_patch16_224": (64, {"img_size": 64}),
}

# row -> why torch.export refuses it
_REFUSED: dict[str, str] = {}


def _network(model: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def network() -> nn.Module:
        import timm

        return timm.create_model(model, pretrained=False, **options)

    return network


def _rows() -> list[Row]:
    table = {**_MODULES, **{model: (model, *spec) for model, spec in _MORE.items()}}
    return [
        row(f"timm/{name}", "timm", _network(model, options), images(size), _REFUSED.get(name, ""))
        for name, (model, size, options) in table.items()
    ]


ROWS = _rows()
