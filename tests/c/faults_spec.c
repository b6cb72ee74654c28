// SPDX-License-Identifier: MIT
/*
 * Faults: how they are read from KVMRING_FAULT, and whose turn it is.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "faults.h"

struct fault faults[16];
int num_faults;

/* The process that was started, and the one that tries a check. */
static pid_t started_by, checker;

static void bad_fault(const char *text)
{
	fprintf(stderr, "faults: KVMRING_FAULT: %s is not understood\n", text);
	_exit(99);
}

static void parse_setting(struct fault *fault, char *text)
{
	const struct {
		const char *name;
		int64_t *value;
	} numbers[] = {
		{ "request", &fault->request }, { "first", &fault->first },
		{ "arg", &fault->arg },		{ "when", &fault->when },
		{ "nth", &fault->nth },		{ "from", &fault->from },
		{ "error", &fault->error },	{ "result", &fault->result },
		{ "add", &fault->add },		{ "at", &fault->at },
		{ "set", &fault->set },		{ "width", &fault->width },
		{ "xor", &fault->xor },		{ "page", &fault->page },
		{ "prot", &fault->prot },	{ "flags", &fault->flags },
		{ "reason", &fault->reason },
	};
	char *value = strchr(text, '='), *end;

	if (!strcmp(text, "instead")) {
		fault->instead = true;
		return;
	}
	if (!strcmp(text, "child")) {
		fault->child = true;
		return;
	}
	if (!value)
		bad_fault(text);
	*value++ = 0;
	if (!strcmp(text, "mode")) {
		snprintf(fault->mode, sizeof(fault->mode), "%s", value);
		return;
	}
	for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
		if (strcmp(text, numbers[i].name))
			continue;
		*numbers[i].value = strtoll(value, &end, 0);
		if (*end || end == value)
			bad_fault(value);
		return;
	}
	bad_fault(text);
}

static void parse_fault(char *text)
{
	struct fault *fault = &faults[num_faults++];
	char *rest = NULL, *word = strtok_r(text, ":", &rest);

	*fault = (struct fault){ .request = UNSET,
				 .first = UNSET,
				 .arg = UNSET,
				 .when = UNSET,
				 .nth = UNSET,
				 .from = UNSET,
				 .error = UNSET,
				 .result = UNSET,
				 .add = UNSET,
				 .at = UNSET,
				 .set = UNSET,
				 .width = 4,
				 .xor = UNSET,
				 .page = UNSET,
				 .prot = UNSET,
				 .flags = UNSET,
				 .reason = UNSET };
	snprintf(fault->name, sizeof(fault->name), "%s", word ? word : "");
	if (!strstr(" ioctl mmap mprotect get ring reset run ", fault->name) || !word)
		bad_fault(fault->name);
	while ((word = strtok_r(NULL, ":", &rest)))
		parse_setting(fault, word);
}

__attribute__((constructor)) static void begin(void)
{
	const char *asked = getenv("KVMRING_FAULT");
	char *copy = strdup(asked ? asked : ""), *rest = NULL;

	started_by = getpid();
	for (char *word = strtok_r(copy, ";", &rest); word; word = strtok_r(NULL, ";", &rest)) {
		if (num_faults == sizeof(faults) / sizeof(faults[0]))
			bad_fault(word);
		parse_fault(word);
	}
	free(copy);
}

struct fault *fault_of(const char *name, const char *mode)
{
	for (int i = 0; i < num_faults; i++)
		if (!strcmp(faults[i].name, name) && (!mode || !strcmp(faults[i].mode, mode)))
			return &faults[i];
	return NULL;
}

bool fault_turn(struct fault *fault)
{
	if (fault->child && (getpid() == started_by || getpid() == checker))
		return false;
	fault->seen++;
	if (fault->nth != UNSET)
		return fault->seen == (uint64_t)fault->nth;
	return fault->from == UNSET || fault->seen >= (uint64_t)fault->from;
}

void fault_checker(void)
{
	if (checker == 0 && getpid() != started_by)
		checker = getpid();
}
