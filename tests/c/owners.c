// SPDX-License-Identifier: MIT
/*
 * References to owners that need no device, taken and dropped by several threads
 * in random order, and the copies and bounds of guest memory.  Nothing may be
 * freed twice, used after it is gone, or left over.
 */
#include <errno.h>
#include <string.h>

#include "../../csrc/internal.h"
#include "check.h"

#define THREADS 4
#define THINGS 16

struct shared {
	struct kvr_map *maps[THINGS];
	struct kvr_ring *rings[THINGS];
	uint64_t seed;
};

/* Each thread owns one reference to everything, and passes more around. */
static void *churn(void *argument)
{
	struct shared *shared = argument;
	uint64_t random = shared->seed ^ (uintptr_t)&random;
	uint32_t order[2 * THINGS];

	random |= 1;
	for (uint32_t i = 0; i < 2000; i++) {
		uint32_t n = below(&random, THINGS);
		uint64_t word;

		if (below(&random, 2)) {
			struct kvr_map *map = kvr_map_get(shared->maps[n]);

			SAME(kvr_map_read(map, 0, &word, 8), 0);
			SAME(word, n);
			kvr_map_put(map);
		} else {
			struct kvr_ring *ring = kvr_ring_get(shared->rings[n]);

			SAME(kvr_ring_entries(ring), 128);
			kvr_ring_put(ring);
		}
	}
	for (uint32_t i = 0; i < 2 * THINGS; i++)
		order[i] = i;
	for (uint32_t i = 2 * THINGS - 1; i; i--) {
		uint32_t j = below(&random, i + 1), kept = order[i];

		order[i] = order[j];
		order[j] = kept;
	}
	for (uint32_t i = 0; i < 2 * THINGS; i++) {
		if (order[i] < THINGS)
			kvr_map_put(shared->maps[order[i]]);
		else
			kvr_ring_put(shared->rings[order[i] - THINGS]);
	}
	return NULL;
}

static void test_references(uint64_t *random)
{
	for (uint32_t round = 0; round < 10; round++) {
		struct shared shared = { .seed = next_random(random) };
		pthread_t threads[THREADS];
		struct kvr_live live;

		for (uint64_t i = 0; i < THINGS; i++) {
			SAME(kvr_map_new(8192, &shared.maps[i]), 0);
			SAME(kvr_map_write(shared.maps[i], 0, &i, 8), 0);
			SAME(kvr_ring_synthetic(128, &shared.rings[i]), 0);
			for (uint32_t t = 1; t < THREADS; t++) {
				kvr_map_get(shared.maps[i]);
				kvr_ring_get(shared.rings[i]);
			}
		}
		kvr_live(&live);
		SAME(live.maps, THINGS);
		SAME(live.rings, THINGS);
		for (uint32_t t = 0; t < THREADS; t++)
			SAME(pthread_create(&threads[t], NULL, churn, &shared), 0);
		for (uint32_t t = 0; t < THREADS; t++)
			pthread_join(threads[t], NULL);
		kvr_live(&live);
		SAME(live.fds, 0);
		SAME(live.maps, 0);
		SAME(live.rings, 0);
	}
}

static void test_bounds_of_memory(void)
{
	const uint64_t size = 1 << 16;
	struct kvr_map *map = NULL;
	unsigned char buf[16] = "fifteen letters";
	uint64_t words[4];

	SAME(kvr_map_new(size, &map), 0);
	SAME(kvr_map_bytes(map), size);
	SAME(kvr_map_write(map, size - 16, buf, 16), 0);
	SAME(kvr_map_read(map, size - 16, buf, 16), 0);
	SAME(memcmp(buf, "fifteen letters", 16), 0);
	SAME(kvr_map_read(map, size, buf, 0), 0);
	SAME(kvr_map_read(map, size - 15, buf, 16), -EFAULT);
	SAME(kvr_map_read(map, size + 1, buf, 0), -EFAULT);
	SAME(kvr_map_read(map, UINT64_MAX, buf, 2), -EFAULT);
	SAME(kvr_map_write(map, 1, buf, UINT64_MAX), -EFAULT);

	for (uint64_t i = 0; i < size / 8; i++)
		SAME(kvr_map_write(map, 8 * i, &i, 8), 0);
	SAME(kvr_map_gather(map, 8, 4096, 4, words), 0);
	for (uint64_t i = 0; i < 4; i++)
		SAME(words[i], 1 + 512 * i);
	SAME(kvr_map_gather(map, size - 8, 8, 1, words), 0);
	SAME(words[0], size / 8 - 1);
	SAME(kvr_map_gather(map, size - 8, 8, 2, words), -EFAULT);
	SAME(kvr_map_gather(map, size, 8, 1, words), -EFAULT);
	SAME(kvr_map_gather(map, size, 8, 0, words), 0);
	SAME(kvr_map_gather(map, 4, 8, 1, words), -EINVAL);
	SAME(kvr_map_gather(map, 0, 12, 1, words), -EINVAL);
	SAME(kvr_map_gather(map, 8, UINT64_MAX - 7, 3, words), -EFAULT);
	/* products that wrap round to 0 */
	SAME(kvr_map_gather(map, 8, UINT64_C(1) << 63, 3, words), -EFAULT);
	SAME(kvr_map_gather(map, 0, 8, (UINT64_C(1) << 61) + 1, words), -EFAULT);
	SAME(kvr_map_gather(map, 0, 8, UINT64_MAX, words), -EFAULT);
	SAME(kvr_map_new(UINT64_MAX / 2, &map), -ENOMEM);
	kvr_map_put(map);
	kvr_map_put(NULL);
	kvr_obj_put(NULL);
}

static void test_what_is_no_kvm(void)
{
	struct kvr_obj *obj = NULL;
	struct kvr_live live;

	SAME(kvr_open("/dev/null", &obj), -ENOTTY);
	SAME(kvr_open("/", &obj), -EISDIR);
	SAME(kvr_open("/nowhere/at/all", &obj), -ENOENT);
	CHECK(!obj);
	kvr_live(&live);
	SAME(live.fds, 0);
}

int main(int argc, char **argv)
{
	uint64_t random = seed_from(argc, argv);

	test_references(&random);
	test_bounds_of_memory();
	test_what_is_no_kvm();
	return 0;
}
