"""LightX2V's flat keys: those that have a new name, and those of features that this version lacks."""

from __future__ import annotations

import json
from typing import Any

from lightx2v.errors import ConfigError

RENAMED: dict[str, str] = {
    "target_height": "video.height",
    "target_width": "video.width",
    "target_video_length": "video.frames",
    "height": "video.height",
    "width": "video.width",
    "num_frames": "video.frames",
    "fps": "video.fps",
    "infer_steps": "sampling.steps",
    "num_inference_steps": "sampling.steps",
    "sample_shift": "sampling.shift",
    "sample_guide_scale": "sampling.guidance",
    "guidance_scale": "sampling.guidance",
    "enable_cfg": "sampling.cfg",
    "use_bfloat16": "dtype",
    "dit_quantized": "mm_config.mm_type",
    "dit_quant_scheme": "mm_config.mm_type",
    "quant_scheme": "mm_config.mm_type",
    "weight_auto_quant": "mm_config.weight_auto_quant",
    "t5_quantized": "t5.quantized",
    "t5_quant_scheme": "t5.quant_scheme",
    "t5_quantized_ckpt": "t5.quantized_ckpt",
    "text_encoder_quantized": "t5.quantized",
    "text_encoder_quant_scheme": "t5.quant_scheme",
    "text_encoder_quantized_ckpt": "t5.quantized_ckpt",
    "clip_quantized": "clip.quantized",
    "clip_quant_scheme": "clip.quant_scheme",
    "clip_quantized_ckpt": "clip.quantized_ckpt",
    "image_encoder_quantized": "clip.quantized",
    "image_encoder_quant_scheme": "clip.quant_scheme",
    "image_encoder_quantized_ckpt": "clip.quantized_ckpt",
    "self_attn_1_type": "attention.type",
    "cross_attn_1_type": "attention.cross",
    "cross_attn_2_type": "attention.cross_image",
    "attention_type": "attention.type",
    "attn_type": "attention.type",
    "attn_mode": "attention.type",
    "use_compile": "compile",
    "save_video_path": "save_result_path",
    "feature_caching": "cache.type",
    "coefficients": "cache.coefficients",
    "teacache_thresh": "cache.threshold",
    "use_ret_steps": "cache.use_ret_steps",
    "magcache_thresh": "cache.threshold",
    "magcache_K": "cache.max_skip",
    "magcache_retention_ratio": "cache.retention",
    "magcache_ratios": "cache.ratios",
    "residual_diff_threshold": "cache.threshold",
    "cpu_offload": "offload.enabled",
    "offload_granularity": "offload.granularity",
    "offload_ratio": "offload.ratio",
    "lazy_load": "offload.lazy_load",
    "num_disk_workers": "offload.workers",
    "max_memory": "offload.max_memory_gb",
    "t5_cpu_offload": "offload.text_encoder",
    "text_encoder_offload": "offload.text_encoder",
    "clip_cpu_offload": "offload.image_encoder",
    "image_encoder_offload": "offload.image_encoder",
    "vae_cpu_offload": "offload.vae",
    "vae_offload": "offload.vae",
    "use_tiling_vae": "vae.tiling",
    "tiny_vae": "vae.tae",
    "use_tiny_vae": "vae.tae",
    "use_tae": "vae.tae",
    "tiny_vae_path": "vae.tae_path",
    "tae_path": "vae.tae_path",
    "need_scaled": "vae.tae_scaled",
    "vae_path": "vae.path",
    "lora_configs": "lora",
    "lora_dynamic_apply": "lora_dynamic",
    "denoising_step_list": "sampling.denoising_step_list",
    "changing_resolution": "sampling.changing_resolution",
    "resolution_rate": "sampling.resolution_rate",
    "changing_resolution_steps": "sampling.changing_resolution_steps",
}
"""Old key to new key. One new key may have several old ones, which then must agree."""

VALUES: dict[str, dict[Any, Any]] = {
    "use_bfloat16": {True: "bfloat16", False: "float32"},
    "dit_quantized": {False: "Default"},
    "feature_caching": {
        "NoCaching": "none",
        "Tea": "teacache",
        "Mag": "magcache",
        "TaylorSeer": "taylorseer",
        "Ada": "adacache",
        "Custom": "custom",
        "FirstBlock": "fbcache",
        "DualBlock": "dbcache",
    },
    "lora_configs": {None: []},
}
"""Old keys whose values changed too."""

_FEATURES: dict[str, str] = {
    "offloading this": "qwen3_cpu_offload t5_lazy_load offload_to_disk",
    "reusing the results of another request": "enable_reuse",
    "LoRA by these keys ('lora' has them as a list)": "lora_path",
    "running on several devices": "parallel parallel_attn_type parallel_vae load_from_rank0 disagg_mode disagg_config",
    "calibration": "do_mm_calib quant_method dummy_model",
    "sparse attention": "sparge sparge_attn_setting sol_attn_setting nbhd_attn_setting dynamic_sparse_attn_setting"
    " general_sparse_attn_setting spas_sage_attn2_setting spas_sage_attn3_setting rainfusion window_size",
    "a LightVAE by this key (vae.path takes its file)": "use_lightvae",
    "another VAE": "use_stream_vae async_vae_decode trt_vae_config vae_dtype",
    "models with an embedded guidance of this kind": "enable_dynamic_cfg",
    "prompt enhancement": "use_prompt_enhancer sub_servers",
    "another compiler": "use_magi_compile",
    "audio": "audio_path",
    "frame interpolation and super-resolution": "video_frame_interpolation video_super_resolution target_fps",
    "choosing how an input image is resized": "resize_mode aspect_ratio aspect_ratios resolution i2v_resolution"
    " bucket_shape fixed_area fixed_shape",
    "checkpoints apart from model_path": "dit_original_ckpt t5_original_ckpt clip_original_ckpt sf_model_path"
    " transformer_model_name high_noise_original_ckpt low_noise_original_ckpt high_noise_quantized_ckpt"
    " low_noise_quantized_ckpt adapter_quantized adapter_quantized_ckpt skip_fp8_block_index",
    "this model family": "boundary boundary_step_index num_channels_latents ar_config num_frame_per_block"
    " num_fragments num_blocks frame_seq_length base_num_frames overlap_history addnoise_condition causal_block_size"
    " qwen25vl_quantized qwen3_quantized layered zero_cond_t prompt_template_encode scheduler_path",
    "an architecture other than the checkpoint's (its config.json gives it)": "dim ffn_dim freq_dim num_heads"
    " num_layers in_dim out_dim text_dim eps qk_norm vae_stride patch_size",
}
UNSUPPORTED: dict[str, str] = {key: feature for feature, keys in _FEATURES.items() for key in keys.split()}
"""Keys that switch on something that this version lacks, and what that is."""

_OFF: tuple[Any, ...] = (None, False, "", [], {})
_NEUTRAL: dict[str, Any] = {
    "window_size": [-1, -1],
    "vae_stride": [4, 8, 8],
    "patch_size": [1, 2, 2],
    "resize_mode": "adaptive",
}

WITHOUT_EFFECT: frozenset[str] = frozenset(
    "offload_path t5_offload_granularity max_area empty_cache_min_free_gib empty_cache_min_reclaimable_gib"
    " rotary_chunk rotary_chunk_size rope_chunk rope_chunk_size rope_type rms_norm_type layer_norm_type modulate_type"
    " magcache_calibration downsample_factor cfg_scale lightvae_pruning_rate sparge_ckpt tp_mm_type"
    " tp_rms_norm_type weight_scale_granularity mxfp8_fuse_enable nvfp4_ffn_split_n_workaround audio_sr video_duration"
    " use_image_encoder".split()
)
"""Keys that only tune such a feature, or how fast something runs: accepted, and a warning names them."""


def show(value: Any) -> str:
    """`value` as JSON, shortened for a message."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_without_effect(key: str) -> bool:
    """Whether `key` is accepted though nothing reads it."""
    # LightX2V's switch for emptying the allocator after each step has the vendor's name in it.
    return key in WITHOUT_EFFECT or (key.startswith("clean_") and key.endswith("_cache"))


def check_off(key: str, value: Any, where: str) -> None:
    """Refuse `value` of an UNSUPPORTED key unless it leaves the feature off."""
    if value not in _OFF and value != _NEUTRAL.get(key):
        raise ConfigError(
            where,
            f"{key} is {show(value)}: {UNSUPPORTED[key]} is not supported by this version",
            do=f"remove '{key}', or set it to {show(_NEUTRAL.get(key, False))}",
        )
