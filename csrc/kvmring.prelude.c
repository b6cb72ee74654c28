/* What the generated CFFI module includes; it adds nothing of its own. */
#define _GNU_SOURCE
#include "kvmring.h"
