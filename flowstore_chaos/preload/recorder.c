/* Records a process's operations on the files of one folder, in order: create, write, sync, truncate and
 * delete. Loaded by LD_PRELOAD. FLOWSTORE_CHAOS_FOLDER names the folder, FLOWSTORE_CHAOS_RECORD the output file
 * outside of it. flowstore_chaos/power_loss.py reads the record.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { MADE = 1, OPENED = 2, WRITTEN = 3, CUT = 4, SYNCED = 5, DELETED = 6, RENAMED = 7 };

#define MAX_FILES 4096

static int record = -1;
static const char *folder;
static size_t folder_length;
/* Serialises recorded operations, so that the order of the records is their true order. */
static pthread_mutex_t order_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t files[MAX_FILES]; /* inodes of the folder's files, by descriptor; 0 is none */

__attribute__((constructor)) static void begin(void) {
    folder = getenv("FLOWSTORE_CHAOS_FOLDER");
    const char *path = getenv("FLOWSTORE_CHAOS_RECORD");
    if (folder == NULL || path == NULL) return;
    folder_length = strlen(folder);
    record = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static void note(enum kind kind, uint64_t file, int64_t offset, const void *data, uint64_t length) {
    int64_t head[4] = {kind, (int64_t)file, offset, (int64_t)length};
    struct iovec parts[2] = {{head, sizeof head}, {(void *)data, data == NULL ? 0 : length}};
    long whole = (long)(sizeof head + parts[1].iov_len);
    /* A partial record would make all later records unreadable. */
    if (syscall(SYS_writev, record, parts, 2) != whole) abort();
}

static int is_ours(const char *path) {
    return record >= 0 && path != NULL && strncmp(path, folder, folder_length) == 0 &&
           (path[folder_length] == '/' || path[folder_length] == 0);
}

static uint64_t inode_at(const char *path) {
    struct stat found;
    return lstat(path, &found) == 0 ? (uint64_t)found.st_ino : 0;
}

static uint64_t known(int descriptor) {
    return record >= 0 && descriptor >= 0 && descriptor < MAX_FILES ? files[descriptor] : 0;
}

static int opening(const char *path, int flags, mode_t mode) {
    if (!is_ours(path)) return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    pthread_mutex_lock(&order_lock);
    int is_new = inode_at(path) == 0;
    int descriptor = (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    if (descriptor >= 0) {
        struct stat found;
        if (descriptor >= MAX_FILES || fstat(descriptor, &found) != 0) abort();
        files[descriptor] = (uint64_t)found.st_ino;
        note(is_new ? MADE : OPENED, files[descriptor], 0, path, strlen(path));
        if ((flags & O_TRUNC) && !is_new) note(CUT, files[descriptor], 0, NULL, 0);
    }
    pthread_mutex_unlock(&order_lock);
    return descriptor;
}

#define OPENING(name)                                              \
    int name(const char *path, int flags, ...) {                   \
        mode_t mode = 0;                                           \
        if (flags & (O_CREAT | __O_TMPFILE)) {                     \
            va_list more;                                          \
            va_start(more, flags);                                 \
            mode = (mode_t)va_arg(more, int);                      \
            va_end(more);                                          \
        }                                                          \
        return opening(path, flags, mode);                         \
    }
OPENING(open)
OPENING(open64)

int close(int descriptor) {
    if (!known(descriptor)) return (int)syscall(SYS_close, descriptor);
    pthread_mutex_lock(&order_lock);
    files[descriptor] = 0;
    int result = (int)syscall(SYS_close, descriptor);
    pthread_mutex_unlock(&order_lock);
    return result;
}

static ssize_t writing_at(int descriptor, const void *data, size_t length, off_t offset) {
    if (!known(descriptor)) return syscall(SYS_pwrite64, descriptor, data, length, offset);
    pthread_mutex_lock(&order_lock);
    ssize_t done = syscall(SYS_pwrite64, descriptor, data, length, offset);
    if (done > 0) note(WRITTEN, files[descriptor], offset, data, (uint64_t)done);
    pthread_mutex_unlock(&order_lock);
    return done;
}

ssize_t pwrite(int descriptor, const void *data, size_t length, off_t offset) {
    return writing_at(descriptor, data, length, offset);
}

ssize_t pwrite64(int descriptor, const void *data, size_t length, off64_t offset) {
    return writing_at(descriptor, data, length, offset);
}

ssize_t write(int descriptor, const void *data, size_t length) {
    if (!known(descriptor)) return syscall(SYS_write, descriptor, data, length);
    pthread_mutex_lock(&order_lock);
    ssize_t done = syscall(SYS_write, descriptor, data, length);
    if (done > 0) {
        off_t end = (off_t)syscall(SYS_lseek, descriptor, 0, SEEK_CUR);
        note(WRITTEN, files[descriptor], end - done, data, (uint64_t)done);
    }
    pthread_mutex_unlock(&order_lock);
    return done;
}

static int cutting(int descriptor, off_t length) {
    if (!known(descriptor)) return (int)syscall(SYS_ftruncate, descriptor, length);
    pthread_mutex_lock(&order_lock);
    int result = (int)syscall(SYS_ftruncate, descriptor, length);
    if (result == 0) note(CUT, files[descriptor], length, NULL, 0);
    pthread_mutex_unlock(&order_lock);
    return result;
}

int ftruncate(int descriptor, off_t length) { return cutting(descriptor, length); }
int ftruncate64(int descriptor, off64_t length) { return cutting(descriptor, length); }

static int syncing(int descriptor, long call) {
    if (!known(descriptor)) return (int)syscall(call, descriptor);
    pthread_mutex_lock(&order_lock);
    int result = (int)syscall(call, descriptor);
    if (result == 0) note(SYNCED, files[descriptor], 0, NULL, 0);
    pthread_mutex_unlock(&order_lock);
    return result;
}

int fsync(int descriptor) { return syncing(descriptor, SYS_fsync); }
int fdatasync(int descriptor) { return syncing(descriptor, SYS_fdatasync); }

int unlink(const char *path) {
    if (!is_ours(path)) return (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    pthread_mutex_lock(&order_lock);
    uint64_t file = inode_at(path);
    int result = (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    if (result == 0) note(DELETED, file, 0, path, strlen(path));
    pthread_mutex_unlock(&order_lock);
    return result;
}

int rename(const char *from, const char *to) {
    int result = (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
    /* SQLite and the store never rename files; the reader rejects a record with renames. */
    if (result == 0 && (is_ours(from) || is_ours(to))) note(RENAMED, 0, 0, to, strlen(to));
    return result;
}
