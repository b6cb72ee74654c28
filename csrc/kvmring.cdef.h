/*
 * CFFI declarations for every architecture.  CFFI compares each with the header
 * at build time; "..." means that the header knows.  After a change here, change
 * kvmring/_kvm.pyi too (a unit test compares them).
 *
 * The kernel's __u64 is an unsigned long long, also where uint64_t is not.
 */

/* Capabilities */
#define KVM_CAP_USER_MEMORY ...
#define KVM_CAP_NR_VCPUS ...
#define KVM_CAP_NR_MEMSLOTS ...
#define KVM_CAP_SYNC_MMU ...
#define KVM_CAP_DESTROY_MEMORY_REGION_WORKS ...
#define KVM_CAP_JOIN_MEMORY_REGIONS_WORKS ...
#define KVM_CAP_MAX_VCPUS ...
#define KVM_CAP_ONE_REG ...
#define KVM_CAP_READONLY_MEM ...
#define KVM_CAP_DEVICE_CTRL ...
#define KVM_CAP_VM_ATTRIBUTES ...
#define KVM_CAP_X86_SMM ...
#define KVM_CAP_MULTI_ADDRESS_SPACE ...
#define KVM_CAP_VCPU_ATTRIBUTES ...
#define KVM_CAP_MAX_VCPU_ID ...
#define KVM_CAP_IMMEDIATE_EXIT ...
#define KVM_CAP_ARM_VM_IPA_SIZE ...
#define KVM_CAP_MANUAL_DIRTY_LOG_PROTECT ...
#define KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 ...
#define KVM_CAP_DIRTY_LOG_RING ...
#define KVM_CAP_BINARY_STATS_FD ...
#define KVM_CAP_ARM_MTE ...
#define KVM_CAP_VM_DISABLE_NX_HUGE_PAGES ...
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL ...
#define KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP ...
#define KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE ...
#define KVM_CAP_USER_MEMORY2 ...
#define KVM_CAP_MEMORY_FAULT_INFO ...
#define KVM_CAP_MEMORY_ATTRIBUTES ...
#define KVM_CAP_GUEST_MEMFD ...
#define KVM_CAP_VM_TYPES ...
#define KVM_CAP_PRE_FAULT_MEMORY ...

/* Constants */
#define KVM_API_VERSION ...
#define KVM_DIRTY_GFN_F_DIRTY ...
#define KVM_DIRTY_GFN_F_RESET ...
#define KVM_DIRTY_LOG_PAGE_OFFSET ...
#define KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE ...
#define KVM_DIRTY_LOG_INITIALLY_SET ...
#define KVM_MEM_LOG_DIRTY_PAGES ...
#define KVM_MEM_READONLY ...
#define KVM_CREATE_DEVICE_TEST ...
#define KVM_EXIT_UNKNOWN ...
#define KVM_EXIT_EXCEPTION ...
#define KVM_EXIT_IO ...
#define KVM_EXIT_HYPERCALL ...
#define KVM_EXIT_DEBUG ...
#define KVM_EXIT_HLT ...
#define KVM_EXIT_MMIO ...
#define KVM_EXIT_IRQ_WINDOW_OPEN ...
#define KVM_EXIT_SHUTDOWN ...
#define KVM_EXIT_FAIL_ENTRY ...
#define KVM_EXIT_INTR ...
#define KVM_EXIT_INTERNAL_ERROR ...
#define KVM_EXIT_SYSTEM_EVENT ...
#define KVM_EXIT_ARM_NISV ...
#define KVM_EXIT_DIRTY_RING_FULL ...
#define KVM_EXIT_MEMORY_FAULT ...
#define KVM_EXIT_IO_IN ...
#define KVM_EXIT_IO_OUT ...
#define KVM_DEV_TYPE_VFIO ...
#define KVM_DEV_TYPE_ARM_VGIC_V2 ...
#define KVM_DEV_TYPE_ARM_VGIC_V3 ...
#define KVM_DEV_TYPE_ARM_VGIC_ITS ...
#define KVM_REG_SIZE_MASK ...
#define KVM_REG_SIZE_SHIFT ...

/* ioctl numbers that have no C function of their own */
#define KVM_GET_API_VERSION ...
#define KVM_CHECK_EXTENSION ...
#define KVM_GET_VCPU_MMAP_SIZE ...
#define KVM_RUN ...
#define KVM_GET_REGS ...
#define KVM_SET_REGS ...
#define KVM_GET_SREGS ...
#define KVM_SET_SREGS ...
#define KVM_GET_ONE_REG ...
#define KVM_SET_ONE_REG ...
#define KVM_GET_REG_LIST ...
#define KVM_SET_DEVICE_ATTR ...
#define KVM_GET_DEVICE_ATTR ...
#define KVM_HAS_DEVICE_ATTR ...
#define KVM_GET_DIRTY_LOG ...
#define KVM_CLEAR_DIRTY_LOG ...
#define KVM_RESET_DIRTY_RINGS ...
#define KVM_ENABLE_CAP ...
#define KVM_SET_USER_MEMORY_REGION ...
#define KVM_SET_USER_MEMORY_REGION2 ...
#define KVM_CREATE_VM ...
#define KVM_CREATE_VCPU ...
#define KVM_CREATE_DEVICE ...
#define KVM_GET_STATS_FD ...

/* The kernel's structs */
struct kvm_dirty_gfn {
	unsigned int flags;
	unsigned int slot;
	unsigned long long offset;
};
struct kvm_enable_cap {
	unsigned int cap;
	unsigned int flags;
	unsigned long long args[4];
	unsigned char pad[64];
};
struct kvm_dirty_log {
	unsigned int slot;
	unsigned int padding1;
	union {
		void *dirty_bitmap;
		unsigned long long padding2;
	};
};
struct kvm_clear_dirty_log {
	unsigned int slot;
	unsigned int num_pages;
	unsigned long long first_page;
	union {
		void *dirty_bitmap;
		unsigned long long padding2;
	};
};
struct kvm_userspace_memory_region {
	unsigned int slot;
	unsigned int flags;
	unsigned long long guest_phys_addr;
	unsigned long long memory_size;
	unsigned long long userspace_addr;
};
struct kvm_userspace_memory_region2 {
	unsigned int slot;
	unsigned int flags;
	unsigned long long guest_phys_addr;
	unsigned long long memory_size;
	unsigned long long userspace_addr;
	unsigned long long guest_memfd_offset;
	unsigned int guest_memfd;
	unsigned int pad1;
	unsigned long long pad2[14];
};
struct kvm_device_attr {
	unsigned int flags;
	unsigned int group;
	unsigned long long attr;
	unsigned long long addr;
};
struct kvm_create_device {
	unsigned int type;
	unsigned int fd;
	unsigned int flags;
};
struct kvm_one_reg {
	unsigned long long id;
	unsigned long long addr;
};
struct kvm_reg_list {
	unsigned long long n;
	unsigned long long reg[];
};
struct kvm_stats_header {
	unsigned int flags;
	unsigned int name_size;
	unsigned int num_desc;
	unsigned int id_offset;
	unsigned int desc_offset;
	unsigned int data_offset;
};
struct kvm_run {
	unsigned char immediate_exit;
	unsigned int exit_reason;
	unsigned short flags;
	union {
		struct {
			unsigned long long hardware_exit_reason;
		} hw;
		struct {
			unsigned long long hardware_entry_failure_reason;
			unsigned int cpu;
		} fail_entry;
		struct {
			unsigned char direction;
			unsigned char size;
			unsigned short port;
			unsigned int count;
			unsigned long long data_offset;
		} io;
		struct {
			unsigned long long phys_addr;
			unsigned char data[8];
			unsigned int len;
			unsigned char is_write;
		} mmio;
		struct {
			unsigned int suberror;
			unsigned int ndata;
			unsigned long long data[16];
		} internal;
		char padding[256];
	};
	...;
};

/* Our own, from kvmring.h */
#define KVR_EFORKED ...
#define KVR_ESIZE ...
#define KVR_EINUSE ...
#define KVR_ENORING ...
#define KVR_EFROZEN ...
#define KVR_THAWED ...
#define KVR_FROZEN_VCPUS ...
#define KVR_FROZEN ...
#define KVR_ATTR_BYTES ...
#define KVR_SUSPECTS ...
#define KVR_ON_PUSH ...
#define KVR_ON_RESET ...
#define KVR_ON_EXIT ...

struct kvr_obj;
struct kvr_map;
struct kvr_ring;
struct kvr_bitmap;
struct kvr_set;
struct kvr_server;
struct kvr_observer;
struct kvr_events;
struct kvr_gfn {
	uint32_t slot;
	uint32_t vcpu;
	uint64_t offset;
};
struct kvr_fault {
	uint64_t taken;
	uint32_t vcpu;
	uint32_t index;
	uint32_t flags;
	uint32_t slot;
	uint64_t offset;
};
struct kvr_reset_result {
	uint64_t reset;
	uint64_t expected;
	uint64_t suspects;
	uint32_t calls;
	uint32_t unknown;
};
struct kvr_high_water {
	uint32_t vcpu;
	uint32_t entries;
};
struct kvr_served {
	uint64_t fulls;
	uint64_t full_ns;
	uint64_t entries;
	uint32_t resets;
	uint32_t short_resets;
	int32_t error;
	uint32_t pad;
	struct kvr_reset_result last;
};
struct kvr_live {
	int32_t fds, maps, rings;
};
struct kvr_ring_view {
	uint64_t time_ns;
	uint32_t write;
	uint32_t known;
	uint32_t pushed;
	uint32_t lapped;
	uint32_t dirty;
	uint32_t harvested;
};
struct kvr_event_field {
	uint16_t offset, size;
};
struct kvr_tracepoint {
	uint32_t id;
	uint32_t kind;
	uint64_t period;
	struct kvr_event_field vcpu, dirty, reset, slot, page;
};
struct kvr_event {
	uint64_t time_ns;
	uint64_t page;
	uint32_t tid;
	uint32_t kind;
	uint32_t vcpu;
	uint32_t slot;
	uint32_t dirty_index;
	uint32_t reset_index;
};
struct kvr_kvm_fd {
	uint32_t number;
	uint32_t is_vm;
	uint32_t vcpu;
};
struct kvr_guest_block {
	uint64_t list;
	uint64_t count;
	uint64_t rounds;
	uint64_t stop;
	uint64_t at;
	uint64_t stores;
	uint64_t round;
	uint64_t doorbell;
	uint64_t values;
};

int kvr_open(const char *path, struct kvr_obj **out);
int kvr_create_vm(struct kvr_obj *sys, unsigned long type, struct kvr_obj **out);
int kvr_create_vcpu(struct kvr_obj *vm, unsigned long id, struct kvr_obj **out);
int kvr_create_device(struct kvr_obj *vm, uint32_t type, uint32_t flags, struct kvr_obj **out);
int kvr_stats_open(struct kvr_obj *vm_or_vcpu, struct kvr_obj **out);
long kvr_pread(struct kvr_obj *obj, void *buf, size_t len, uint64_t offset);
void kvr_obj_put(struct kvr_obj *obj);
int kvr_fileno(struct kvr_obj *obj);
int kvr_ioctl(struct kvr_obj *obj, unsigned long request, void *arg);
int kvr_ioctl_int(struct kvr_obj *obj, unsigned long request, unsigned long arg);

int kvr_map_new(uint64_t bytes, struct kvr_map **out);
void kvr_map_put(struct kvr_map *map);
uint64_t kvr_map_bytes(const struct kvr_map *map);
int kvr_map_read(struct kvr_map *map, uint64_t offset, void *buf, uint64_t len);
int kvr_map_write(struct kvr_map *map, uint64_t offset, const void *buf, uint64_t len);
int kvr_map_gather(struct kvr_map *map, uint64_t offset, uint64_t stride, uint64_t count,
		   uint64_t *out);
void kvr_live(struct kvr_live *out);
void kvr_kernel_page_size(uint64_t *out);

int kvr_enable_cap(struct kvr_obj *obj, uint32_t cap, uint32_t flags, const uint64_t *args);
int kvr_ring_bytes(struct kvr_obj *vm, uint64_t *out);
int kvr_set_memory(struct kvr_obj *vm, int version, uint32_t slot, uint32_t flags, uint64_t gpa,
		   uint64_t bytes, struct kvr_map *map, uint64_t map_offset);
int kvr_get_dirty_log(struct kvr_obj *vm, uint32_t slot, struct kvr_bitmap *into);
int kvr_clear_dirty_log(struct kvr_obj *vm, uint32_t slot, const struct kvr_bitmap *bits,
			uint64_t first, uint32_t num);
int kvr_device_attr(struct kvr_obj *obj, unsigned long request, uint32_t group, uint64_t attr,
		    void *buf, uint32_t len);
int kvr_one_reg(struct kvr_obj *vcpu, unsigned long request, uint64_t id, void *buf, uint32_t len);

int kvr_vcpu_ring(struct kvr_obj *vcpu, struct kvr_ring **out);
void kvr_ring_put(struct kvr_ring *ring);
uint32_t kvr_ring_entries(const struct kvr_ring *ring);
int kvr_ring_indices(struct kvr_ring *ring, uint32_t *fetch, uint32_t *reset);
int kvr_ring_fill(struct kvr_ring *ring, uint32_t *out);
int kvr_gfns_new(uint64_t capacity, struct kvr_gfn **out);
void kvr_gfns_free(struct kvr_gfn *gfns);
long kvr_ring_harvest(struct kvr_ring *ring, struct kvr_gfn *gfns, struct kvr_set *set,
		      uint64_t max, struct kvr_fault *fault);
long kvr_vm_harvest(struct kvr_obj *vm, struct kvr_gfn *gfns, struct kvr_set *set, uint64_t max,
		    struct kvr_fault *fault);
long kvr_vm_high_water(struct kvr_obj *vm, struct kvr_high_water *out, uint32_t room, int clear);
int kvr_reset_dirty_rings(struct kvr_obj *vm, int guarded, struct kvr_gfn *suspects, uint32_t room,
			  struct kvr_reset_result *out);
int kvr_ring_synthetic(uint32_t entries, struct kvr_ring **out);
long kvr_synthetic_push(struct kvr_ring *ring, uint32_t slot, uint64_t first, uint32_t num);
long kvr_synthetic_reset(struct kvr_ring *ring);
int kvr_synthetic_poke(struct kvr_ring *ring, uint32_t index, uint32_t flags);

int kvr_bitmap_new(uint64_t num_pages, struct kvr_bitmap **out);
void kvr_bitmap_free(struct kvr_bitmap *bm);
uint64_t kvr_bitmap_pages_total(const struct kvr_bitmap *bm);
uint64_t *kvr_bitmap_words(struct kvr_bitmap *bm);
uint64_t kvr_bitmap_count(const struct kvr_bitmap *bm);
int kvr_bitmap_test(const struct kvr_bitmap *bm, uint64_t page);
int kvr_bitmap_set_range(struct kvr_bitmap *bm, uint64_t first, uint64_t num, int value);
int kvr_bitmap_set_pages(struct kvr_bitmap *bm, const uint64_t *pages, uint64_t num);
int kvr_bitmap_merge(struct kvr_bitmap *dst, int op, const struct kvr_bitmap *src);
int kvr_bitmap_equal(const struct kvr_bitmap *a, const struct kvr_bitmap *b);
uint64_t kvr_bitmap_page_numbers(const struct kvr_bitmap *bm, uint64_t *next, uint64_t base,
				 uint64_t scale, uint64_t *out, uint64_t max);
uint64_t kvr_bitmap_runs(const struct kvr_bitmap *bm, uint64_t *next, uint64_t *out, uint64_t max);
int kvr_set_new(uint32_t n, struct kvr_set **out);
void kvr_set_free(struct kvr_set *set);
int kvr_set_put(struct kvr_set *set, uint32_t slot, struct kvr_bitmap *bm);
uint64_t kvr_set_strays(const struct kvr_set *set);

int kvr_run(struct kvr_obj *vcpu, struct kvm_run *out);
int kvr_kick(struct kvr_obj *vcpu);
int kvr_leave(struct kvr_obj *vcpu, uint32_t timeout_ms);
int kvr_freeze(struct kvr_obj *vm, int level);
int kvr_running(struct kvr_obj *vcpu);
long kvr_io_data(struct kvr_obj *vcpu, void *buf, uint32_t max);
int kvr_respond(struct kvr_obj *vcpu, const void *buf, uint32_t len);

int kvr_server_new(struct kvr_server **out);
void kvr_server_free(struct kvr_server *server);
int kvr_server_lend(struct kvr_server *server, struct kvr_set *set);
int kvr_server_take_back(struct kvr_server *server, struct kvr_served *out,
			 struct kvr_gfn *suspects, uint32_t room);
int kvr_run_serving(struct kvr_obj *vcpu, struct kvr_server *server, struct kvm_run *out);

int kvr_observer_new(uint32_t pid, uint64_t there, uint32_t entries, struct kvr_observer **out);
void kvr_observer_free(struct kvr_observer *obs);
long kvr_observer_poll(struct kvr_observer *obs, uint32_t vcpu, struct kvr_gfn *fresh, uint32_t max,
		       struct kvr_ring_view *view);
long kvr_kvm_fds(uint32_t pid, struct kvr_kvm_fd *out, uint32_t max);
int kvr_same_file(uint32_t pid, uint32_t one, uint32_t other);

int kvr_events_new(const struct kvr_tracepoint *points, uint32_t n, struct kvr_events **out);
void kvr_events_free(struct kvr_events *ev);
int kvr_events_attach(struct kvr_events *ev, uint32_t tid, uint32_t pages);
int kvr_events_detach(struct kvr_events *ev, uint32_t tid);
long kvr_events_read(struct kvr_events *ev, struct kvr_event *out, uint32_t max, uint64_t *lost);
int kvr_events_wait(struct kvr_events *ev, uint32_t timeout_ms);

extern const unsigned char kvr_guest_code[];
uint32_t kvr_guest_code_bytes(void);
