/* SPDX-License-Identifier: MIT */
/*
 * What the C tests share: CHECK, which ends the program with a line that says
 * what was wrong, and a random generator whose seed is an argument, so that a
 * failure can be repeated.  Programs return 0 passed, 1 failed, 77 skipped.
 */
#ifndef CHECK_H
#define CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define SKIPPED 77

#define CHECK(condition)                                                                           \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);    \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

/* Two values that should be the same, shown when they are not. */
#define SAME(a, b)                                                                                 \
	do {                                                                                       \
		long long a_ = (long long)(a), b_ = (long long)(b);                                \
                                                                                                   \
		if (a_ != b_) {                                                                    \
			fprintf(stderr, "%s:%d: %s is %lld, %s is %lld\n", __FILE__, __LINE__, #a, \
				a_, #b, b_);                                                       \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

/* xorshift64*: each thread has a state of its own. */
static inline uint64_t next_random(uint64_t *state)
{
	uint64_t x = *state;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	*state = x;
	return x * UINT64_C(0x2545F4914F6CDD1D);
}

static inline uint32_t below(uint64_t *state, uint32_t limit)
{
	return (uint32_t)(next_random(state) >> 33) % limit;
}

static inline uint64_t seed_from(int argc, char **argv)
{
	uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;

	return seed ? seed : 1;
}

#endif
