// SPDX-License-Identifier: MIT
/*
 * Tracepoint events of another process's threads, through perf_event_open(2).
 *
 * One buffer per thread, because perf maps none for events that follow a whole
 * process; a thread's tracepoints share it.  The fds and the mappings belong to
 * struct kvr_events and go when a thread is detached or the owner is freed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/perf_event.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

/* Linux 6.0: read(2) of an event tells how many of its records found no room. */
#ifndef PERF_FORMAT_LOST
#define PERF_FORMAT_LOST (1U << 4)
#endif

/* The largest record: a header counts its bytes in 16 bits. */
#define RECORD_BYTES 65536

struct thread {
	uint32_t tid;
	int fds[KVR_ON_KINDS];
	uint32_t num_fds;
	bool over;	  /* the thread has ended */
	bool counts_lost; /* read(2) tells; else the records do, later */
	uint64_t lost;	  /* told so far */
	struct perf_event_mmap_page *page;
	size_t bytes; /* of the mapping, its first page included */
};

struct kvr_events {
	unsigned int generation;
	atomic_int busy;
	struct kvr_tracepoint points[KVR_ON_KINDS];
	uint32_t num_points;
	struct thread *threads;
	struct pollfd *polled;
	uint32_t num_threads;
	uint32_t turn; /* whose buffer is read first, so that a busy one starves none */
	unsigned char record[RECORD_BYTES];
};

int kvr_events_new(const struct kvr_tracepoint *points, uint32_t n, struct kvr_events **out)
{
	struct kvr_events *ev;

	if (!n || n > KVR_ON_KINDS)
		return -EINVAL;
	for (uint32_t i = 0; i < n; i++)
		if (points[i].kind >= KVR_ON_KINDS || !points[i].period)
			return -EINVAL;
	ev = calloc(1, sizeof(*ev));
	if (!ev)
		return -ENOMEM;
	ev->generation = atomic_load(&kvr_generation);
	memcpy(ev->points, points, n * sizeof(*points));
	ev->num_points = n;
	*out = ev;
	return 0;
}

static void thread_drop(struct thread *thread, bool foreign)
{
	if (thread->page) {
		if (!foreign)
			munmap(thread->page, thread->bytes);
		atomic_fetch_sub(&kvr_live_maps, 1);
	}
	for (uint32_t i = 0; i < thread->num_fds; i++) {
		close(thread->fds[i]);
		atomic_fetch_sub(&kvr_live_fds, 1);
	}
}

void kvr_events_free(struct kvr_events *ev)
{
	bool foreign = kvr_foreign(ev->generation);

	for (uint32_t i = 0; i < ev->num_threads; i++)
		thread_drop(&ev->threads[i], foreign);
	free(ev->threads);
	free(ev->polled);
	free(ev);
}

static int enter(struct kvr_events *ev)
{
	if (kvr_foreign(ev->generation))
		return -KVR_EFORKED;
	if (atomic_exchange_explicit(&ev->busy, 1, memory_order_acquire))
		return -KVR_EINUSE;
	return 0;
}

static void leave(struct kvr_events *ev)
{
	atomic_store_explicit(&ev->busy, 0, memory_order_release);
}

static int open_event(const struct kvr_tracepoint *point, uint32_t tid, uint32_t wakeup,
		      uint64_t read_format)
{
	struct perf_event_attr attr = {
		.type = PERF_TYPE_TRACEPOINT,
		.size = sizeof(attr),
		.config = point->id,
		.sample_period = point->period,
		/* Not PERF_SAMPLE_PERIOD: with it a tracepoint ignores the period. */
		.sample_type = PERF_SAMPLE_TID | PERF_SAMPLE_TIME | PERF_SAMPLE_RAW,
		.read_format = read_format,
		.disabled = 1,
		.watermark = 1,
		.wakeup_watermark = wakeup,
		.use_clockid = 1,
		.clockid = CLOCK_MONOTONIC,
	};
	long fd = syscall(SYS_perf_event_open, &attr, (pid_t)tid, -1, -1, PERF_FLAG_FD_CLOEXEC);

	return fd < 0 ? -errno : (int)fd;
}

static int thread_open(struct kvr_events *ev, struct thread *thread, uint32_t pages)
{
	size_t bytes = (pages + 1) * kvr_page_size();
	void *addr;

	thread->counts_lost = true;
	for (uint32_t i = 0; i < ev->num_points; i++) {
		uint32_t wakeup = (uint32_t)(bytes / 4);
		int fd = -EINVAL;

		if (thread->counts_lost)
			fd = open_event(&ev->points[i], thread->tid, wakeup, PERF_FORMAT_LOST);
		if (fd == -EINVAL) {
			thread->counts_lost = false;
			fd = open_event(&ev->points[i], thread->tid, wakeup, 0);
		}
		if (fd < 0)
			return fd;
		thread->fds[thread->num_fds++] = fd;
		atomic_fetch_add(&kvr_live_fds, 1);
	}
	addr = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, thread->fds[0], 0);
	if (addr == MAP_FAILED)
		return -errno;
	madvise(addr, bytes, MADV_DONTFORK);
	thread->page = addr;
	thread->bytes = bytes;
	atomic_fetch_add(&kvr_live_maps, 1);
	for (uint32_t i = 1; i < thread->num_fds; i++)
		if (ioctl(thread->fds[i], PERF_EVENT_IOC_SET_OUTPUT, thread->fds[0]) < 0)
			return -errno;
	for (uint32_t i = 0; i < thread->num_fds; i++)
		if (ioctl(thread->fds[i], PERF_EVENT_IOC_ENABLE, 0) < 0)
			return -errno;
	return 0;
}

static uint32_t find(const struct kvr_events *ev, uint32_t tid)
{
	uint32_t i = 0;

	while (i < ev->num_threads && ev->threads[i].tid != tid)
		i++;
	return i;
}

static int attach(struct kvr_events *ev, uint32_t tid, uint32_t pages)
{
	struct thread thread = { .tid = tid }, *threads;
	struct pollfd *polled;
	int ret;

	if (!pages || pages & (pages - 1))
		return -EINVAL;
	if (find(ev, tid) < ev->num_threads)
		return -EEXIST;
	threads = realloc(ev->threads, (ev->num_threads + 1) * sizeof(*threads));
	if (!threads)
		return -ENOMEM;
	ev->threads = threads;
	polled = realloc(ev->polled, (ev->num_threads + 1) * sizeof(*polled));
	if (!polled)
		return -ENOMEM;
	ev->polled = polled;
	ret = thread_open(ev, &thread, pages);
	if (ret) {
		thread_drop(&thread, false);
		return ret;
	}
	ev->threads[ev->num_threads++] = thread;
	return 0;
}

int kvr_events_attach(struct kvr_events *ev, uint32_t tid, uint32_t pages)
{
	int ret = enter(ev);

	if (ret)
		return ret;
	ret = attach(ev, tid, pages);
	leave(ev);
	return ret;
}

int kvr_events_detach(struct kvr_events *ev, uint32_t tid)
{
	int ret = enter(ev);
	uint32_t i;

	if (ret)
		return ret;
	i = find(ev, tid);
	if (i < ev->num_threads) {
		thread_drop(&ev->threads[i], false);
		ev->threads[i] = ev->threads[--ev->num_threads];
	} else {
		ret = -ESRCH;
	}
	leave(ev);
	return ret;
}

/* Copy out of the buffer, round its end. */
static void copy_out(const struct thread *thread, uint64_t from, void *to, size_t bytes)
{
	const unsigned char *data = (unsigned char *)thread->page + kvr_page_size();
	size_t size = thread->bytes - kvr_page_size(), at = from & (size - 1);
	size_t first = size - at < bytes ? size - at : bytes;

	memcpy(to, data + at, first);
	memcpy((unsigned char *)to + first, data, bytes - first);
}

static uint64_t field(const unsigned char *raw, uint32_t size, struct kvr_event_field where)
{
	uint32_t four;
	uint64_t eight;

	if ((uint32_t)where.offset + where.size > size)
		return 0;
	if (where.size == 4) {
		memcpy(&four, raw + where.offset, 4);
		return four;
	}
	if (where.size == 8) {
		memcpy(&eight, raw + where.offset, 8);
		return eight;
	}
	return 0;
}

/* A sample's body: pid, tid, time, size of the raw part, and that. */
static bool decode(const struct kvr_events *ev, const unsigned char *body, uint32_t bytes,
		   struct kvr_event *out)
{
	const unsigned char *raw = body + 20;
	uint32_t size;
	uint16_t id;

	if (bytes < 22)
		return false;
	memcpy(&out->tid, body + 4, 4);
	memcpy(&out->time_ns, body + 8, 8);
	memcpy(&size, body + 16, 4);
	if (size > bytes - 20)
		return false;
	memcpy(&id, raw, 2); /* common_type, the first field of every event */
	for (uint32_t i = 0; i < ev->num_points; i++) {
		const struct kvr_tracepoint *point = &ev->points[i];

		if (point->id != id)
			continue;
		out->kind = point->kind;
		out->vcpu = (uint32_t)field(raw, size, point->vcpu);
		out->dirty_index = (uint32_t)field(raw, size, point->dirty);
		out->reset_index = (uint32_t)field(raw, size, point->reset);
		out->slot = (uint32_t)field(raw, size, point->slot);
		out->page = field(raw, size, point->page);
		return true;
	}
	return false;
}

static uint64_t lost_of(const struct thread *thread)
{
	uint64_t sum = 0;

	for (uint32_t i = 0; i < thread->num_fds; i++) {
		uint64_t counts[2]; /* events, and those lost */

		if (read(thread->fds[i], counts, sizeof(counts)) == (ssize_t)sizeof(counts))
			sum += counts[1];
	}
	return sum;
}

static uint32_t read_thread(struct kvr_events *ev, struct thread *thread, struct kvr_event *out,
			    uint32_t max, uint64_t *lost)
{
	/* Pairs with the barrier before the kernel's store of data_head: who sees
	 * the head sees the records before it (kernel/events/ring_buffer.c). */
	uint64_t head = __atomic_load_n(&thread->page->data_head, __ATOMIC_ACQUIRE);
	uint64_t tail = thread->page->data_tail;
	uint32_t n = 0;

	while (tail < head && n < max) {
		struct perf_event_header header;
		uint32_t bytes;

		copy_out(thread, tail, &header, sizeof(header));
		if (header.size < sizeof(header))
			break; /* cannot be; rather stop than spin */
		bytes = header.size - (uint32_t)sizeof(header);
		copy_out(thread, tail + sizeof(header), ev->record, bytes);
		tail += header.size;
		if (header.type == PERF_RECORD_LOST && bytes >= 16) {
			uint64_t count;

			memcpy(&count, ev->record + 8, 8);
			*lost += thread->counts_lost ? 0 : count;
		} else if (header.type == PERF_RECORD_SAMPLE) {
			n += decode(ev, ev->record, bytes, &out[n]);
		}
	}
	/* Pairs with the kernel's read of data_tail: it writes over what we have read. */
	__atomic_store_n(&thread->page->data_tail, tail, __ATOMIC_RELEASE);
	if (thread->counts_lost) {
		uint64_t now = lost_of(thread);

		*lost += now - thread->lost;
		thread->lost = now;
	}
	return n;
}

long kvr_events_read(struct kvr_events *ev, struct kvr_event *out, uint32_t max, uint64_t *lost)
{
	uint32_t n = 0;
	int ret = enter(ev);

	if (ret)
		return ret;
	for (uint32_t i = 0; i < ev->num_threads && n < max; i++)
		n += read_thread(ev, &ev->threads[(ev->turn + i) % ev->num_threads], out + n,
				 max - n, lost);
	ev->turn = ev->num_threads ? (ev->turn + 1) % ev->num_threads : 0;
	leave(ev);
	return n;
}

int kvr_events_wait(struct kvr_events *ev, uint32_t timeout_ms)
{
	int ret = enter(ev);

	if (ret)
		return ret;
	for (uint32_t i = 0; i < ev->num_threads; i++) {
		const struct thread *thread = &ev->threads[i];

		/* a thread that has ended hangs up at once and for ever */
		ev->polled[i] = (struct pollfd){ thread->over ? -1 : thread->fds[0], POLLIN, 0 };
	}
	ret = poll(ev->polled, ev->num_threads, (int)timeout_ms);
	if (ret < 0)
		ret = -errno;
	for (uint32_t i = 0; ret > 0 && i < ev->num_threads; i++)
		ev->threads[i].over |= !!(ev->polled[i].revents & (POLLHUP | POLLERR));
	leave(ev);
	return ret > 0 ? 1 : ret;
}
