// SPDX-License-Identifier: MIT
/*
 * Which descriptors of a process are KVM's, from /proc/PID/fd.
 *
 * In C because a host has thousands of processes, and each of their descriptors
 * is looked at: relative to the folder that costs a third of what it does by path.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"

#define VM_LINK "anon_inode:kvm-vm"
#define VCPU_LINK "anon_inode:kvm-vcpu:"

/* Is the link KVM's?  -1: a VM's; 0 or more: that vCPU's; -2: neither. */
static int64_t whose(const char *link)
{
	if (!strcmp(link, VM_LINK))
		return -1;
	if (!strncmp(link, VCPU_LINK, sizeof(VCPU_LINK) - 1))
		return (int64_t)strtoul(link + sizeof(VCPU_LINK) - 1, NULL, 10);
	return -2;
}

long kvr_kvm_fds(uint32_t pid, struct kvr_kvm_fd *out, uint32_t max)
{
	char path[32], link[64];
	struct dirent *entry;
	long n = 0;
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%u/fd", pid);
	dir = opendir(path);
	if (!dir)
		return -errno;
	while ((entry = readdir(dir))) {
		ssize_t len;
		int64_t vcpu;

		if (entry->d_name[0] == '.')
			continue;
		len = readlinkat(dirfd(dir), entry->d_name, link, sizeof(link) - 1);
		if (len < 0) {
			if (errno == ENOENT)
				continue; /* closed meanwhile */
			n = -errno;
			break;
		}
		link[len] = 0;
		vcpu = whose(link);
		if (vcpu == -2)
			continue;
		if (n < max)
			out[n] = (struct kvr_kvm_fd){ (uint32_t)strtoul(entry->d_name, NULL, 10),
						      vcpu < 0, (uint32_t)vcpu };
		n++;
	}
	closedir(dir);
	return n;
}

/* 1: the two descriptors of that process are one open file; 0: they are not. */
int kvr_same_file(uint32_t pid, uint32_t one, uint32_t other)
{
	long ret = syscall(SYS_kcmp, (pid_t)pid, (pid_t)pid, 0 /* KCMP_FILE */, (unsigned long)one,
			   (unsigned long)other);

	return ret < 0 ? -errno : ret == 0;
}
