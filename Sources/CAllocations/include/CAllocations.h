// Counts heap allocations, for tests only: linking this target replaces malloc and its relatives.
#ifndef HAPTERA_CALLOCATIONS_H
#define HAPTERA_CALLOCATIONS_H
#include <stdint.h>

// Allocations (malloc, calloc, realloc, aligned ones) made by the calling thread so far.
uint64_t haptera_thread_allocations(void);
// Zero where the allocator is somebody else's (AddressSanitizer): a test has nothing to count then.
int haptera_counts_allocations(void);
#endif
