// What is read from and written to a row of logits between a step and its sample.
#include "loadmaster_native.h"

#include <algorithm>
#include <cmath>
#include <limits>

extern "C" {

void lm_mask_logits(float * logits, int32_t n_vocab, const uint32_t * allowed) {
    const float never = -std::numeric_limits<float>::infinity();
    for (int32_t start = 0; start < n_vocab; start += 32) {
        const uint32_t word = allowed[start / 32];
        float * const  end  = logits + std::min(n_vocab, start + 32);
        if (word == 0) {  // the usual words: none of them, or all
            std::fill(logits + start, end, never);
        } else if (word != UINT32_MAX) {
            for (float * at = logits + start; at < end; at++) {
                if (!(word >> (at - logits - start) & 1)) *at = never;
            }
        }
    }
}

int lm_likeliest(const float * logits, int32_t n_vocab, int32_t n_top, int32_t * top, double * log_sum) {
    if (n_vocab < 1 || n_top < 0 || n_top > LM_TOP_MAX) return LM_BAD_ARGUMENT;
    const float highest = *std::max_element(logits, logits + n_vocab);
    double sum = 0;
    for (int32_t i = 0; i < n_vocab; i++) sum += std::exp(logits[i] - highest);
    *log_sum = highest + std::log(sum);
    int n = 0;  // so far, likeliest first; of equals the smaller token
    for (int32_t i = 0; i < n_vocab && n_top > 0; i++) {
        if (n == n_top && !(logits[i] > logits[top[n - 1]])) continue;
        int at = n < n_top ? n++ : n - 1;
        for (; at > 0 && logits[i] > logits[top[at - 1]]; at--) top[at] = top[at - 1];
        top[at] = i;
    }
    return n;
}

}  // extern "C"
