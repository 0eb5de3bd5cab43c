"""Where a GPU's time goes: kernels by kind."""

import pytest
import torch

from softvq.evaluation.profiling import profiled, shares_of

KERNELS = {
    "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN": "matrix products",
    "void cutlass::Kernel2<cutlass_75_tensorop_bf16_s1688gemm_bf16_64x64_nn_align1>": "matrix products",
    "sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64": "convolutions",
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_256x64>": "convolutions",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64": "attention",
    "triton_per_fused__to_copy_add_mul_native_layer_norm_backward_view_9": "fused by the compiler",
    "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16>": "layout",
    "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>": "layout",
    "void at::native::elementwise_kernel<128, 2, BinaryFunctor<float>>": "elementwise",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>":
        "optimizer, averages, norms of gradients",
    "Memcpy HtoD (Pinned -> Device)": "copies and fills",
    "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float>>": "sums and norms",
    "void at::native::(anonymous namespace)::adaptive_average_pool": "other",
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_known_by_their_names(name: str) -> None:
    (share,) = shares_of([(name, 1.0, 1)], 1)
    assert (share.kind, share.longest) == (KERNELS[name], name)


def test_kinds_are_summed_over_calls_and_the_longest_comes_first() -> None:
    kernels = [("nvjet_a", 1.0, 3), ("triton_poi_b", 4.0, 2), ("nvjet_c", 2.0, 5), ("nvjet_d", 3.0, 4)]
    first, second = shares_of(kernels, 2)
    assert (first.kind, first.seconds, first.launches, first.longest) == ("matrix products", 3.0, 6.0, "nvjet_d")
    assert (second.kind, second.seconds, second.launches) == ("fused by the compiler", 2.0, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_products_time_is_found() -> None:
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.profiler.record_function("a name over it"):
        shares = profiled(lambda: a @ a)
    assert shares[0].kind == "matrix products"
    assert shares[0].launches == 1
