// Numbers of kernels on NVIDIA GPUs: the type of inputs and outputs, by TYPE, and 16-bit integers as pairs of bytes.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short half_bits;

// Single instructions. Tests without a GPU have their own in C++, and compile all the rest as it is.
#ifdef __CUDACC__
__device__ __forceinline__ float from_half(half_bits bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ half_bits to_half(float value) {
    half_bits bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
__device__ __forceinline__ half_bits to_bfloat16(float value) {
    half_bits bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

#if TYPE == 0
typedef float scalar;
__device__ __forceinline__ float widen(scalar value) { return value; }
__device__ __forceinline__ scalar narrow(float value) { return value; }
#elif TYPE == 1
typedef half_bits scalar;
__device__ __forceinline__ float widen(scalar value) { return from_half(value); }
__device__ __forceinline__ scalar narrow(float value) { return to_half(value); }
#else
typedef half_bits scalar;
__device__ __forceinline__ float widen(scalar value) { return __uint_as_float((u32)value << 16); }
__device__ __forceinline__ scalar narrow(float value) { return to_bfloat16(value); }
#endif

// The next launch may start before this one ends (programmatic dependent launch), and waits before it reads from it.
__device__ __forceinline__ void start_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Columns of a lane, four per word, as 16-bit integers x = 256 hi + lo: bytes with signs. Of all lanes the unit, NaN if
// one number is not finite; of the lane Σ x.
template <int WORDS>
__device__ __forceinline__ float integers(const float* values, u32* high, u32* low, int& sum) {
    // Of floats without a sign the bits ascend as they do, and NaN is above all.
    u32 bits = 0;
#pragma unroll
    for (int k = 0; k < 4 * WORDS; k++) bits = max(bits, __float_as_uint(fabsf(values[k])));
    bits = __reduce_max_sync(~0u, bits);
    const float most = 127 * 256 + 127, largest = __uint_as_float(bits);
    const float scale = largest > 1e-30f ? most / largest : 0.f;  // of what is smaller the scale would not be finite
    sum = 0;
#pragma unroll
    for (int word = 0; word < WORDS; word++) {
        high[word] = low[word] = 0;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int x = __float2int_rn(fminf(fmaxf(values[4 * word + k] * scale, -most), most)), hi = (x + 128) >> 8;
            sum += x;
            high[word] |= (u32)(hi & 255) << (8 * k);
            low[word] |= (u32)((x - 256 * hi) & 255) << (8 * k);
        }
    }
    return bits < 0x7F800000 ? largest / most : __int_as_float(0x7FFFFFFF);
}
