// Instructions of other CPUs, computed by those of any with AVX-512: -include this and define
// EMULATED_BF16 for products of bf16 in vectors, EMULATED_AMX for matrix units besides.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace emulated {

inline __m256bh to_bf16(__m512 v) {
    __m512i bits = _mm512_castps_si512(v);
    __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
    __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    __m256bh out;
    std::memcpy(&out, &halves, sizeof out);
    return out;
}

inline __m512 products(__m512 sum, __m512bh a, __m512bh b) {
    __m512i x, y;
    std::memcpy(&x, &a, sizeof x);
    std::memcpy(&y, &b, sizeof y);
    const __m512i high = _mm512_set1_epi32(int(0xffff0000));
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                          _mm512_castsi512_ps(_mm512_and_si512(y, high)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                           _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), sum);
}

// Eight tiles of 16 rows of 64 bytes, of each thread its own.
inline uint8_t (*tile(int number))[64] {
    static thread_local uint8_t tiles[8][16][64];
    return tiles[number];
}

inline void load(int to, const void* from, int64_t stride) {
    for (int i = 0; i < 16; i++)
        std::memcpy(tile(to)[i], static_cast<const char*>(from) + i * stride, 64);
}

inline void store(int from, void* to, int64_t stride) {
    for (int i = 0; i < 16; i++)
        std::memcpy(static_cast<char*>(to) + i * stride, tile(from)[i], 64);
}

inline void multiply(int to, int left, int right) {
    for (int i = 0; i < 16; i++) {
        __m512 sum = _mm512_loadu_ps(tile(to)[i]);
        for (int k = 0; k < 16; k++) {
            int32_t pair;
            std::memcpy(&pair, tile(left)[i] + 4 * k, sizeof pair);
            __m512i both = _mm512_set1_epi32(pair);
            __m512bh a, b;
            std::memcpy(&a, &both, sizeof a);
            std::memcpy(&b, tile(right)[k], sizeof b);
            sum = products(sum, a, b);
        }
        _mm512_storeu_ps(tile(to)[i], sum);
    }
}

}  // namespace emulated

#undef __AVX512BF16__
#define __AVX512BF16__ 1
#define _mm512_cvtneps_pbh emulated::to_bf16
#define _mm512_dpbf16_ps emulated::products

#undef __AMX_TILE__
#undef __AMX_BF16__
#ifdef EMULATED_AMX
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(shape) static_cast<void>(shape)
#define _tile_release() static_cast<void>(0)
#define _tile_zero(number) std::memset(emulated::tile(number), 0, 16 * 64)
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply
// Linux is asked for leave to use them
#define syscall(...) 0L
#endif
