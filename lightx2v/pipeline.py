"""The Python API: `LightX2VPipeline`, with the method names of LightX2V's own.

pipe = LightX2VPipeline(task="t2v", model_path="Wan2.1-T2V-1.3B", model_cls="wan2.1")
pipe.enable_quantize(dit_quantized=True, quant_scheme="int8", dit_quantized_ckpt="Wan2.1-T2V-1.3B-int8")
pipe.create_generator(infer_steps=50, height=480, width=832, num_frames=81)
frames = pipe.generate(seed=42, prompt="a cat on the grass", save_result_path="cat.mp4")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from loguru import logger

from lightx2v.config.features import LoraConfig
from lightx2v.config.load import load_config
from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError
from lightx2v.foreign import PipelinePlan, PipelineRunner
from lightx2v.io.media import check_result_path, write_result
from lightx2v.plan import Plan
from lightx2v.runner import Runner, make_runner, open_plan
from lightx2v.sampling.loop import Progress
from lightx2v.timing import StageTimer


class LightX2VPipeline:
    """One loaded model that serves many `generate` calls, each with its own prompt, seed, steps and size.

    Settings are collected first and take effect in `create_generator`, which `generate` calls by itself if nobody did.
    Without `model_path` the embedded tiny-wan runs.
    """

    def __init__(
        self,
        task: str = "t2v",
        model_path: str | None = None,
        model_cls: str = "wan2.1",
        device: str = "auto",
        dtype: str | None = None,
    ) -> None:
        chosen = {"task": task, "model_path": model_path, "model_cls": model_cls, "device": device, "dtype": dtype}
        self._overrides: dict[str, Any] = {key: value for key, value in chosen.items() if value is not None}
        self._runner: Runner | PipelineRunner | None = None

    @classmethod
    def from_config(cls, config: Config) -> LightX2VPipeline:
        """A pipeline of a configuration that is complete already."""
        pipe = cls(task=config.task, model_path=config.model_path, model_cls=config.model_cls)
        pipe._runner = make_runner(open_plan(config))
        return pipe

    def _set(self, values: dict[str, Any]) -> LightX2VPipeline:
        if self._runner is not None:
            raise ConfigError(
                "LightX2VPipeline", "settings are fixed once the generator exists", do="make a new pipeline"
            )
        self._overrides |= {key: value for key, value in values.items() if value is not None}
        return self

    def enable_quantize(
        self,
        dit_quantized: bool = False,
        text_encoder_quantized: bool = False,
        image_encoder_quantized: bool = False,
        dit_quantized_ckpt: str | None = None,
        text_encoder_quantized_ckpt: str | None = None,
        image_encoder_quantized_ckpt: str | None = None,
        quant_scheme: str = "fp8",
        text_encoder_quant_scheme: str | None = None,
    ) -> LightX2VPipeline:
        """Run components on quantized weights; a DiT without a converted checkpoint is quantized as it loads."""
        encoder_scheme = text_encoder_quant_scheme or quant_scheme
        values: dict[str, Any] = {}
        if dit_quantized:
            values |= {
                "mm_config.mm_type": quant_scheme,
                "dit_quantized_ckpt": dit_quantized_ckpt,
                "mm_config.weight_auto_quant": dit_quantized_ckpt is None,
            }
        for key, enabled, path in (
            ("t5", text_encoder_quantized, text_encoder_quantized_ckpt),
            ("clip", image_encoder_quantized, image_encoder_quantized_ckpt),
        ):
            if enabled:
                values |= {
                    f"{key}.quantized": True,
                    f"{key}.quant_scheme": encoder_scheme,
                    f"{key}.quantized_ckpt": path,
                }
        return self._set(values)

    def enable_offload(
        self,
        cpu_offload: bool = True,
        offload_granularity: str = "block",
        text_encoder_offload: bool = False,
        image_encoder_offload: bool = False,
        vae_offload: bool = False,
        offload_ratio: float = 1.0,
        lazy_load: bool = False,
    ) -> LightX2VPipeline:
        """Keep weights off the device until they are needed; `cpu_offload="auto"` takes the mildest form that fits."""
        return self._set(
            {
                "offload.enabled": cpu_offload,
                "offload.granularity": offload_granularity,
                "offload.ratio": offload_ratio,
                "offload.lazy_load": lazy_load,
                "offload.text_encoder": text_encoder_offload,
                "offload.image_encoder": image_encoder_offload,
                "offload.vae": vae_offload,
            }
        )

    def enable_cache(self, method: str = "Tea", **options: Any) -> LightX2VPipeline:
        """Reuse what earlier steps made. `method` by LightX2V's name or ours; options as in the section `cache`."""
        settings = {f"cache.{key}": value for key, value in options.items()}
        return self._set({"feature_caching": method, **settings})

    def enable_lora(
        self, lora_configs: Sequence[Mapping[str, Any]], lora_dynamic_apply: bool | None = None
    ) -> LightX2VPipeline:
        """Apply LoRAs, each `{"path": ..., "strength": 1.0, "name": ...}`."""
        return self._set({"lora": list(map(dict, lora_configs)), "lora_dynamic": lora_dynamic_apply})

    def enable_compile(self) -> LightX2VPipeline:
        """Compile the blocks of the DiT."""
        return self._set({"compile": True})

    def enable_lightvae(
        self, use_tae: bool = False, vae_path: str | None = None, tae_path: str | None = None
    ) -> LightX2VPipeline:
        """Decode with a tiny autoencoder, or with another VAE such as a LightVAE."""
        return self._set({"vae.tae": use_tae, "vae.path": vae_path, "vae.tae_path": tae_path})

    def switch_lora(self, lora_configs: Sequence[Mapping[str, Any]]) -> None:
        """Exchange the LoRAs for these, from the next `generate` on; an empty list is the plain model.

        Raises ConfigError and CheckpointError, and changes nothing, for LoRAs that do not fit.
        """
        self.native.switch_lora([LoraConfig.model_validate(dict(entry)) for entry in lora_configs])

    def create_generator(
        self,
        attn_mode: str | None = None,
        infer_steps: int | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        sample_shift: float | None = None,
        fps: int | None = None,
        config_json: str | None = None,
    ) -> LightX2VPipeline:
        """Fix the settings and resolve the plan; arguments win over `config_json`. Weights load on first use."""
        self._set(
            {
                "attention.type": attn_mode,
                "sampling.steps": infer_steps,
                "sampling.guidance": guidance_scale,
                "sampling.shift": sample_shift,
                "video.frames": num_frames,
                "video.height": height,
                "video.width": width,
                "video.fps": fps,
            }
        )
        self._runner = make_runner(open_plan(load_config(config_json, self._overrides, [])))
        return self

    @property
    def runner(self) -> Runner | PipelineRunner:
        if self._runner is None:
            self.create_generator()
        assert self._runner is not None
        return self._runner

    @property
    def native(self) -> Runner:
        """The runner of one of this engine's own models. Raises ConfigError for a pipeline of diffusers."""
        if not isinstance(self.runner, Runner):
            raise ConfigError("model_cls", "a pipeline of diffusers does not take this", allowed="wan2.1, flux")
        return self.runner

    @property
    def plan(self) -> Plan | PipelinePlan:
        """What was resolved: print `pipe.plan.render()`."""
        return self.runner.plan

    @property
    def timer(self) -> StageTimer:
        """Seconds and peak memory of each stage of the latest `generate`."""
        return self.runner.timer

    def generate(
        self,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        seed: int | None = None,
        image_path: str | None = None,
        save_result_path: str | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        shift: float | None = None,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        fps: int | None = None,
        callback: Callable[[Progress], None] | None = None,
        quiet: bool = False,
    ) -> np.ndarray:
        """Make one video; returns its frames, uint8 [T, H, W, 3], and writes them when `save_result_path` is given.

        What is not given comes from the configuration. Raises ConfigError for values that do not fit the model.
        """
        given: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "seed": seed,
            "image_path": image_path,
            "steps": steps,
            "guidance": guidance,
            "shift": shift,
            "height": height,
            "width": width,
            "frames": frames,
            "fps": fps,
        }
        request = replace(self.plan.request, **{key: value for key, value in given.items() if value is not None})
        if save_result_path is not None:
            check_result_path(save_result_path)
        pictures = self.runner.run(request, callback, quiet)
        if save_result_path is not None:
            path = write_result(pictures, save_result_path, request.fps, self.runner.metadata(request))
            logger.info("saved {}", path)
        return pictures
