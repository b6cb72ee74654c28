// SPDX-License-Identifier: MIT
/*
 * KVM_RUN, and the kick that ends it.
 *
 * A kick sets immediate_exit, then signals the thread that is inside KVM_RUN.
 * The signal ends a guest that runs; the flag ends an entry that had not begun
 * when the signal came.  The flag is taken back by the run that it ended, and by
 * no other, so no kick is lost.  A signal that comes late may end one run more.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

/* What run() copies: the head of kvm_run and the union of exits, 256 bytes. */
#define EXIT_BYTES (offsetof(struct kvm_run, mmio) + 256)

static void on_kick(int sig)
{
	(void)sig; /* interrupting the system call is all it is for */
}

static pthread_once_t kick_once = PTHREAD_ONCE_INIT;
static int kick_signal;

/* The highest real-time signal that nobody has a handler for. */
static void choose_signal(void)
{
	kick_signal = -EBUSY;
	for (int sig = SIGRTMAX; sig >= SIGRTMIN; sig--) {
		struct sigaction action, other;

		if (sigaction(sig, NULL, &other) || (other.sa_flags & SA_SIGINFO) ||
		    other.sa_handler != SIG_DFL)
			continue;
		memset(&action, 0, sizeof(action));
		action.sa_handler = on_kick;
		/* a kick that comes late must not disturb other system calls */
		action.sa_flags = SA_RESTART;
		if (sigaction(sig, &action, NULL))
			continue;
		kick_signal = sig;
		return;
	}
}

int kvr_kick_signal(void)
{
	pthread_once(&kick_once, choose_signal);
	return kick_signal;
}

/* A thread that was started with signals blocked could not be kicked. */
static void unblock_kick(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, kick_signal);
	pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

static void leave(struct kvr_vcpu *vcpu)
{
	pthread_mutex_lock(&vcpu->lock);
	vcpu->runs++;
	atomic_store(&vcpu->tid, 0);
	pthread_cond_broadcast(&vcpu->left);
	pthread_mutex_unlock(&vcpu->lock);
}

int kvr_run(struct kvr_obj *obj, struct kvm_run *out)
{
	struct kvr_vcpu *vcpu = kvr_vcpu(obj);
	int idle = 0, ret;

	if (kvr_foreign(obj->generation))
		return -KVR_EFORKED;
	if (obj->kind != KVR_VCPU)
		return kvr_ioctl_int(obj, KVM_RUN, 0);
	unblock_kick();
	if (kvr_frozen(obj, KVR_FROZEN_VCPUS))
		return -KVR_EFROZEN;
	/* Sequentially consistent, against kvr_kick(): either the kicker sees this
	 * thread, or KVM sees immediate_exit. */
	if (!atomic_compare_exchange_strong(&vcpu->tid, &idle, (int)gettid()))
		return -KVR_EINUSE;
	/* Asked again, now that kvr_leave() can see this thread: it comes after the
	 * freeze, and finds either nobody or somebody to wait for. */
	if (kvr_frozen(obj, KVR_FROZEN_VCPUS)) {
		leave(vcpu);
		return -KVR_EFROZEN;
	}
	ret = ioctl(obj->fd, KVM_RUN, 0) < 0 ? -errno : 0;
	/* The return code comes before exit_reason: an interrupted run leaves the
	 * reason of an earlier exit standing. */
	memcpy(out, vcpu->run, EXIT_BYTES);
	if (ret == -EINTR) {
		out->exit_reason = KVM_EXIT_INTR;
		__atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
	}
	if (ret == -EFAULT && out->exit_reason == KVM_EXIT_MEMORY_FAULT)
		ret = 0;
	leave(vcpu);
	return ret;
}

int kvr_kick(struct kvr_obj *obj)
{
	struct kvr_vcpu *vcpu = kvr_vcpu(obj);
	int ret = kvr_expect(obj, KVR_VCPU);
	int tid;

	if (ret)
		return ret;
	__atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
	tid = atomic_load(&vcpu->tid);
	/* The thread may have left meanwhile, or even ended: then the signal finds
	 * a handler that does nothing, or nobody. */
	if (tid)
		syscall(SYS_tgkill, getpid(), tid, kick_signal);
	return 0;
}

int kvr_leave(struct kvr_obj *obj, uint32_t timeout_ms)
{
	struct kvr_vcpu *vcpu = kvr_vcpu(obj);
	int ret = kvr_expect(obj, KVR_VCPU);
	struct timespec until;
	uint64_t seen;

	if (ret)
		return ret;
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_nsec -= 1000000000;
		until.tv_sec++;
	}
	pthread_mutex_lock(&vcpu->lock);
	seen = vcpu->runs;
	if (atomic_load(&vcpu->tid)) {
		kvr_kick(obj);
		while (!ret && vcpu->runs == seen)
			ret = -pthread_cond_timedwait(&vcpu->left, &vcpu->lock, &until);
	}
	pthread_mutex_unlock(&vcpu->lock);
	return ret;
}

int kvr_freeze(struct kvr_obj *obj, int level)
{
	int ret = kvr_expect(obj, KVR_VM);

	if (!ret)
		atomic_store(&kvr_vm(obj)->frozen, level);
	return ret;
}

int kvr_running(struct kvr_obj *obj)
{
	int ret = kvr_expect(obj, KVR_VCPU);

	return ret ? ret : atomic_load(&kvr_vcpu(obj)->tid) != 0;
}

/* Exit data of port I/O lies behind kvm_run, at an offset that KVM names. */
static unsigned char *io_area(struct kvr_vcpu *vcpu, uint64_t *bytes)
{
	const struct kvm_run *run = vcpu->run;

	if (run->exit_reason != KVM_EXIT_IO)
		return NULL;
	*bytes = (uint64_t)run->io.size * run->io.count;
	if (run->io.data_offset > vcpu->run_bytes || *bytes > vcpu->run_bytes - run->io.data_offset)
		return NULL;
	return (unsigned char *)vcpu->run + run->io.data_offset;
}

long kvr_io_data(struct kvr_obj *obj, void *buf, uint32_t max)
{
	int ret = kvr_expect(obj, KVR_VCPU);
	unsigned char *data;
	uint64_t bytes;

	if (ret)
		return ret;
	data = io_area(kvr_vcpu(obj), &bytes);
	if (!data || bytes > max)
		return -EINVAL;
	memcpy(buf, data, bytes);
	return (long)bytes;
}

int kvr_respond(struct kvr_obj *obj, const void *buf, uint32_t len)
{
	int ret = kvr_expect(obj, KVR_VCPU);
	struct kvm_run *run;
	unsigned char *data;
	uint64_t bytes;

	if (ret)
		return ret;
	run = kvr_vcpu(obj)->run;
	data = io_area(kvr_vcpu(obj), &bytes);
	if (data) {
		if (run->io.direction != KVM_EXIT_IO_IN || bytes != len)
			return -EINVAL;
		memcpy(data, buf, len);
		return 0;
	}
	if (run->exit_reason != KVM_EXIT_MMIO || run->mmio.is_write || run->mmio.len != len ||
	    len > sizeof(run->mmio.data))
		return -EINVAL;
	memcpy(run->mmio.data, buf, len);
	return 0;
}

uint32_t kvr_guest_code_bytes(void)
{
	return (uint32_t)(kvr_guest_code_end - kvr_guest_code);
}
