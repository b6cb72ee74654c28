// SPDX-License-Identifier: MIT
/*
 * fork(): what the parent made answers -KVR_EFORKED in the child and can be
 * dropped there, its mappings are not there, and the parent notices nothing.
 * The child may make owners of its own, which its child in turn may not use.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../csrc/internal.h"
#include "check.h"

static struct kvr_map *map;
static struct kvr_ring *ring;
static struct kvr_obj *sys, *vm, *vcpu; /* NULL where /dev/kvm cannot be used */

static void make(void)
{
	SAME(kvr_map_new(8192, &map), 0);
	SAME(kvr_ring_synthetic(128, &ring), 0);
	SAME(kvr_synthetic_push(ring, 0, 0, 5), 5);
	if (kvr_open("/dev/kvm", &sys))
		return;
	SAME(kvr_create_vm(sys, 0, &vm), 0);
	SAME(kvr_create_vcpu(vm, 0, &vcpu), 0);
}

static void drop(void)
{
	kvr_map_put(map);
	kvr_ring_put(ring);
	kvr_obj_put(sys);
	kvr_obj_put(vm);
	kvr_obj_put(vcpu);
	sys = vm = vcpu = NULL;
}

static void use(int wanted)
{
	uint64_t word = 7, bytes;
	uint32_t fetch, reset, fill;
	struct kvr_fault fault;
	struct kvr_gfn gfn;

	SAME(kvr_map_read(map, 0, &word, 8), wanted);
	SAME(kvr_map_write(map, 0, &word, 8), wanted);
	SAME(kvr_map_gather(map, 0, 8, 1, &word), wanted);
	SAME(kvr_ring_indices(ring, &fetch, &reset), wanted);
	SAME(kvr_ring_fill(ring, &fill), wanted);
	SAME(kvr_ring_harvest(ring, &gfn, NULL, 0, &fault), wanted);
	if (!vcpu)
		return;
	SAME(kvr_ioctl_int(sys, KVM_GET_API_VERSION, 0), wanted ? wanted : KVM_API_VERSION);
	SAME(kvr_ring_bytes(vm, &bytes), wanted);
	SAME(kvr_running(vcpu), wanted);
}

static void use_foreign(void)
{
	const uint64_t args[4] = { 4096 };
	struct kvr_obj *out = NULL;
	struct kvr_ring *none = NULL;
	struct kvr_reset_result result;
	struct kvr_bitmap *bm;
	struct kvr_fault fault;
	struct kvr_gfn gfn;
	struct kvm_run run;

	use(-KVR_EFORKED);
	if (!vcpu)
		return;
	SAME(kvr_bitmap_new(2, &bm), 0); /* bitmaps belong to nobody */
	SAME(kvr_create_vm(sys, 0, &out), -KVR_EFORKED);
	SAME(kvr_create_vcpu(vm, 1, &out), -KVR_EFORKED);
	SAME(kvr_create_device(vm, 4, 0, &out), -KVR_EFORKED);
	SAME(kvr_stats_open(vm, &out), -KVR_EFORKED);
	SAME(kvr_pread(vm, &gfn, 1, 0), -KVR_EFORKED);
	SAME(kvr_ioctl(vm, KVM_CHECK_EXTENSION, NULL), -KVR_EFORKED);
	SAME(kvr_enable_cap(vm, KVM_CAP_DIRTY_LOG_RING, 0, args), -KVR_EFORKED);
	SAME(kvr_set_memory(vm, 1, 0, 0, 0, 8192, map, 0), -KVR_EFORKED);
	SAME(kvr_get_dirty_log(vm, 0, bm), -KVR_EFORKED);
	SAME(kvr_clear_dirty_log(vm, 0, bm, 0, 2), -KVR_EFORKED);
	SAME(kvr_vcpu_ring(vcpu, &none), -KVR_EFORKED);
	SAME(kvr_vm_harvest(vm, &gfn, NULL, 1, &fault), -KVR_EFORKED);
	SAME(kvr_reset_dirty_rings(vm, 1, NULL, 0, &result), -KVR_EFORKED);
	SAME(kvr_run(vcpu, &run), -KVR_EFORKED);
	SAME(kvr_kick(vcpu), -KVR_EFORKED);
	SAME(kvr_io_data(vcpu, &gfn, 1), -KVR_EFORKED);
	SAME(kvr_respond(vcpu, &gfn, 1), -KVR_EFORKED);
	CHECK(!out && !none);
	kvr_bitmap_free(bm);
}

static void expect_success(pid_t pid)
{
	int status;

	SAME(waitpid(pid, &status, 0), pid);
	CHECK(WIFEXITED(status));
	SAME(WEXITSTATUS(status), 0);
}

static void in_child(int depth)
{
	struct kvr_live live;

	use_foreign();
	drop();
	kvr_live(&live);
	SAME(live.fds, 0);
	SAME(live.maps, 0);
	SAME(live.rings, 0);
	make(); /* a process that was forked may begin anew */
	use(0);
	if (depth) {
		pid_t pid = fork();

		CHECK(pid >= 0);
		if (!pid) {
			in_child(depth - 1);
			_exit(0);
		}
		expect_success(pid);
		use(0);
	}
	drop();
}

int main(void)
{
	uint32_t fill;

	make();
	use(0);
	for (uint32_t i = 0; i < 5; i++) {
		pid_t pid = fork();

		CHECK(pid >= 0);
		if (!pid) {
			in_child(1);
			_exit(0);
		}
		expect_success(pid);
		use(0);
		SAME(kvr_ring_fill(ring, &fill), 0);
		SAME(fill, 5);
	}
	if (!vcpu)
		printf("without a VM: /dev/kvm cannot be used\n");
	drop();
	return 0;
}
