// SPDX-License-Identifier: MIT
/*
 * Owners of real VMs: systems, VMs, vCPUs with rings, memory and statistics are
 * dropped by several threads in random order, while others harvest and reset.
 * Skipped where /dev/kvm cannot be used.
 */
#include <dirent.h>
#include <errno.h>
#include <string.h>

#include "../../csrc/internal.h"
#include "check.h"

#define VCPUS 3
#define SLOTS 3
#define RING_BYTES 65536
#define MEMORY 65536

enum { A_VM, FIRST_VCPU, FIRST_MAP = FIRST_VCPU + VCPUS, FIRST_RING = FIRST_MAP + SLOTS };
enum { THINGS = FIRST_RING + VCPUS };

/* One VM, taken apart by two threads: each thing goes to one of them. */
struct world {
	void *things[THINGS];
	atomic_bool gone[THINGS];
	bool rings;
	uint64_t seed;
};

static int count_fds(void)
{
	DIR *dir = opendir("/proc/self/fd");
	int n = 0;

	CHECK(dir);
	while (readdir(dir))
		n++;
	closedir(dir);
	return n;
}

static struct kvr_obj *open_kvm(void)
{
	struct kvr_obj *sys = NULL;
	int ret = kvr_open("/dev/kvm", &sys);

	if (!ret) {
		struct kvr_obj *vm;

		ret = kvr_create_vm(sys, 0, &vm);
		if (!ret)
			kvr_obj_put(vm);
	}
	if (ret) {
		printf("/dev/kvm cannot be used: %s\n", strerror(-ret));
		exit(SKIPPED);
	}
	return sys;
}

static void build(struct world *world, struct kvr_obj *sys)
{
	const uint64_t args[4] = { RING_BYTES };
	struct kvr_obj *vm, *vcpu;

	SAME(kvr_create_vm(sys, 0, &vm), 0);
	world->things[A_VM] = vm;
	world->rings = !kvr_enable_cap(vm, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 0, args);
	for (uint32_t i = 0; i < SLOTS; i++) {
		struct kvr_map *map;

		SAME(kvr_map_new(MEMORY, &map), 0);
		SAME(kvr_set_memory(vm, 1, i, KVM_MEM_LOG_DIRTY_PAGES, i * UINT64_C(0x100000),
				    MEMORY, map, 0),
		     0);
		world->things[FIRST_MAP + i] = map;
	}
	for (uint32_t i = 0; i < VCPUS; i++) {
		struct kvr_ring *ring = NULL;

		SAME(kvr_create_vcpu(vm, i, &vcpu), 0);
		SAME(kvr_vcpu_ring(vcpu, &ring), world->rings ? 0 : -KVR_ENORING);
		world->things[FIRST_VCPU + i] = vcpu;
		world->things[FIRST_RING + i] = ring;
	}
}

static void drop(struct world *world, uint32_t i)
{
	if (atomic_exchange(&world->gone[i], true))
		return;
	if (i < FIRST_MAP)
		kvr_obj_put(world->things[i]);
	else if (i < FIRST_RING)
		kvr_map_put(world->things[i]);
	else
		kvr_ring_put(world->things[i]);
}

static void *take_apart(void *argument)
{
	struct world *world = argument;
	uint64_t random = (world->seed ^ (uintptr_t)&random) | 1;

	for (uint32_t i = 0; i < 4 * THINGS; i++)
		drop(world, below(&random, THINGS));
	for (uint32_t i = 0; i < THINGS; i++)
		drop(world, i);
	return NULL;
}

static void expect_nothing_live_but(int fds)
{
	struct kvr_live live;

	kvr_live(&live);
	SAME(live.fds, fds);
	SAME(live.maps, 0);
	SAME(live.rings, 0);
}

static void test_any_order_of_dropping(struct kvr_obj *sys, uint64_t *random)
{
	int before = count_fds();

	for (uint32_t round = 0; round < 40; round++) {
		struct world world = { .seed = next_random(random) };
		pthread_t other;

		build(&world, sys);
		SAME(pthread_create(&other, NULL, take_apart, &world), 0);
		take_apart(&world);
		pthread_join(other, NULL);
		expect_nothing_live_but(1);
		SAME(count_fds(), before);
	}
}

/* Calls that take the same locks in their order, from three threads. */
static atomic_int users;

static void *use(void *argument)
{
	struct world *world = argument;
	struct kvr_obj *vm = world->things[A_VM];
	struct kvr_bitmap *bm;
	struct kvr_set *set;

	SAME(kvr_bitmap_new(MEMORY / kvr_page_size(), &bm), 0);
	SAME(kvr_set_new(1, &set), 0);
	SAME(kvr_set_put(set, 0, bm), 0);
	for (uint32_t i = 0; i < 300; i++) {
		struct kvr_reset_result result;
		struct kvr_fault fault;
		uint32_t fetch, reset;
		long n = kvr_vm_harvest(vm, NULL, set, UINT64_MAX, &fault);

		CHECK(n == 0 || n == -KVR_EINUSE);
		SAME(kvr_reset_dirty_rings(vm, 1, NULL, 0, &result), world->rings ? 0 : -EINVAL);
		SAME(result.reset, 0);
		for (uint32_t v = 0; world->rings && v < VCPUS; v++)
			SAME(kvr_ring_indices(world->things[FIRST_RING + v], &fetch, &reset), 0);
		SAME(kvr_get_dirty_log(vm, 0, bm), world->rings ? -ENXIO : 0);
		SAME(kvr_set_memory(vm, 1, SLOTS + (uint32_t)i % 2, 0, 0, 0, NULL, 0), -EINVAL);
		SAME(kvr_kick(world->things[FIRST_VCPU]), 0);
		SAME(kvr_running(world->things[FIRST_VCPU]), 0);
	}
	kvr_set_free(set);
	kvr_bitmap_free(bm);
	atomic_fetch_add(&users, 1);
	return NULL;
}

static void test_calls_from_many_threads(struct kvr_obj *sys)
{
	struct world world = { .seed = 1 };
	pthread_t threads[3];

	build(&world, sys);
	for (uint32_t t = 0; t < 3; t++)
		SAME(pthread_create(&threads[t], NULL, use, &world), 0);
	for (uint32_t t = 0; t < 3; t++)
		pthread_join(threads[t], NULL);
	SAME(atomic_load(&users), 3);
	take_apart(&world);
	expect_nothing_live_but(1);
}

static void test_wrong_kinds(struct kvr_obj *sys)
{
	struct kvr_obj *vm, *out = NULL;
	struct kvr_ring *ring = NULL;
	struct kvr_fault fault;
	struct kvr_gfn gfn;
	uint64_t bytes;

	SAME(kvr_create_vm(sys, 0, &vm), 0);
	SAME(kvr_create_vm(vm, 0, &out), -ENOTTY);
	CHECK(kvr_create_vcpu(sys, 0, &out) < 0); /* x86 says EINVAL here */
	SAME(kvr_vcpu_ring(vm, &ring), -ENOTTY);
	SAME(kvr_vm_harvest(sys, &gfn, NULL, 1, &fault), -ENOTTY);
	SAME(kvr_ring_bytes(sys, &bytes), -ENOTTY);
	SAME(kvr_kick(vm), -ENOTTY);
	SAME(kvr_running(sys), -ENOTTY);
	SAME(kvr_io_data(vm, &gfn, 1), -ENOTTY);
	SAME(kvr_respond(vm, &gfn, 1), -ENOTTY);
	CHECK(!out && !ring);
	kvr_obj_put(vm);
	expect_nothing_live_but(1);
}

int main(int argc, char **argv)
{
	uint64_t random = seed_from(argc, argv);
	struct kvr_obj *sys = open_kvm();

	test_any_order_of_dropping(sys, &random);
	test_calls_from_many_threads(sys);
	test_wrong_kinds(sys);
	kvr_obj_put(sys);
	expect_nothing_live_but(0);
	return 0;
}
