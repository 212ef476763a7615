"""AngelSlim's quantization of diffusion transformers: https://github.com/Tencent/AngelSlim."""
