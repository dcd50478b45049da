/* Faults at the system calls of a process, below one folder: fail, kill, or write everything down.
 *
 * Preloaded into a process (LD_PRELOAD); silent until `io_faults_arm`. Every call that touches a
 * file below the folder counts: the n-th one fails with an errno (once, or from then on), or the
 * process is killed before it. With a trace, the calls that change files are written down with
 * their data, so that what a disk may hold after a power cut can be worked out.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))real(&real_##name, #name))
static void *real_write, *real_pwrite, *real_pwrite64, *real_pread, *real_pread64, *real_fsync,
    *real_fdatasync, *real_ftruncate, *real_ftruncate64, *real_open, *real_open64, *real_openat,
    *real_openat64, *real_rename, *real_unlink, *real_mkdir;

static void *real(void **known, const char *name)
{
    return *known ? *known : (*known = dlsym(RTLD_NEXT, name));
}

static char folder[PATH_MAX];
static size_t folder_size;
static long calls, strike_at, strike_errno; /* errno 0: kill */
static int strike_forever, trace_fd = -1;

void io_faults_arm(const char *path, long at, int error, int forever, int trace)
{
    snprintf(folder, sizeof folder, "%s", path);
    folder_size = strlen(folder);
    calls = 0;
    strike_at = at;
    strike_errno = error;
    strike_forever = forever;
    trace_fd = trace;
}

long io_faults_calls(void) { return calls; }

void io_faults_disarm(void) { folder_size = 0; }

struct record {
    int64_t kind, inode, offset, size; /* then `size` bytes */
};

static void put(int kind, int64_t inode, int64_t offset, const void *data, size_t size)
{
    if (trace_fd < 0)
        return;
    struct record record = {kind, inode, offset, (int64_t)size};
    struct iovec parts[2] = {{&record, sizeof record}, {(void *)data, size}};
    if (writev(trace_fd, parts, size ? 2 : 1) < 0)
        raise(SIGABRT);
}

void io_faults_mark(int64_t number) { put('m', number, 0, NULL, 0); }

static int below(const char *path)
{
    return folder_size && !strncmp(path, folder, folder_size);
}

static int watched(int fd)
{
    char link[64], path[PATH_MAX];
    if (!folder_size)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0)
        return 0;
    path[n] = 0;
    return below(path);
}

static int64_t inode_of(int fd)
{
    struct stat facts;
    return fstat(fd, &facts) ? -1 : (int64_t)facts.st_ino;
}

/* Count a call; whether it is to fail. */
static int struck(void)
{
    calls++;
    if (!strike_at || calls < strike_at || (calls > strike_at && !strike_forever))
        return 0;
    if (!strike_errno)
        kill(getpid(), SIGKILL);
    errno = (int)strike_errno;
    return 1;
}

#define WRITE_LIKE(name, offset_type)                                                     \
    ssize_t name(int fd, const void *data, size_t size, offset_type offset)               \
    {                                                                                     \
        int ours = watched(fd);                                                           \
        if (ours && struck())                                                             \
            return -1;                                                                    \
        ssize_t n = REAL(name)(fd, data, size, offset);                                   \
        if (ours && n > 0)                                                                \
            put('w', inode_of(fd), offset, data, (size_t)n);                              \
        return n;                                                                         \
    }
WRITE_LIKE(pwrite, off_t)
WRITE_LIKE(pwrite64, off64_t)

ssize_t write(int fd, const void *data, size_t size)
{
    int ours = watched(fd);
    if (ours && struck())
        return -1;
    off_t offset = ours ? lseek(fd, 0, SEEK_CUR) : 0;
    ssize_t n = REAL(write)(fd, data, size);
    if (ours && n > 0)
        put('w', inode_of(fd), offset, data, (size_t)n);
    return n;
}

#define READ_LIKE(name, offset_type)                                                      \
    ssize_t name(int fd, void *data, size_t size, offset_type offset)                     \
    {                                                                                     \
        if (watched(fd) && struck())                                                      \
            return -1;                                                                    \
        return REAL(name)(fd, data, size, offset);                                        \
    }
READ_LIKE(pread, off_t)
READ_LIKE(pread64, off64_t)

#define SYNC_LIKE(name)                                                                   \
    int name(int fd)                                                                      \
    {                                                                                     \
        int ours = watched(fd);                                                           \
        if (ours && struck())                                                             \
            return -1;                                                                    \
        int status = REAL(name)(fd);                                                      \
        if (ours && !status)                                                              \
            put('s', inode_of(fd), 0, NULL, 0);                                           \
        return status;                                                                    \
    }
SYNC_LIKE(fsync)
SYNC_LIKE(fdatasync)

#define TRUNCATE_LIKE(name, offset_type)                                                  \
    int name(int fd, offset_type size)                                                    \
    {                                                                                     \
        int ours = watched(fd);                                                           \
        if (ours && struck())                                                             \
            return -1;                                                                    \
        int status = REAL(name)(fd, size);                                                \
        if (ours && !status)                                                              \
            put('t', inode_of(fd), size, NULL, 0);                                        \
        return status;                                                                    \
    }
TRUNCATE_LIKE(ftruncate, off_t)
TRUNCATE_LIKE(ftruncate64, off64_t)

static int opened(int fd, const char *path, int flags)
{
    if (fd >= 0 && below(path) && (flags & (O_CREAT | O_TRUNC))) {
        struct stat facts;
        int is_new = !fstat(fd, &facts) && !facts.st_size;
        put(is_new ? 'n' : 'c', inode_of(fd), 0, path, strlen(path));
        if (flags & O_TRUNC)
            put('t', inode_of(fd), 0, NULL, 0);
    }
    return fd;
}

#define MODE                                                                              \
    mode_t mode = 0;                                                                      \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                  \
        va_list rest;                                                                     \
        va_start(rest, flags);                                                            \
        mode = va_arg(rest, mode_t);                                                      \
        va_end(rest);                                                                     \
    }

#define OPEN_LIKE(name)                                                                   \
    int name(const char *path, int flags, ...)                                            \
    {                                                                                     \
        MODE                                                                              \
        if (below(path) && struck())                                                      \
            return -1;                                                                    \
        return opened(REAL(name)(path, flags, mode), path, flags);                        \
    }
OPEN_LIKE(open)
OPEN_LIKE(open64)

#define OPENAT_LIKE(name)                                                                 \
    int name(int at, const char *path, int flags, ...)                                    \
    {                                                                                     \
        MODE                                                                              \
        if (below(path) && struck())                                                      \
            return -1;                                                                    \
        return opened(REAL(name)(at, path, flags, mode), path, flags);                    \
    }
OPENAT_LIKE(openat)
OPENAT_LIKE(openat64)

int rename(const char *from, const char *to)
{
    int ours = below(to) || below(from);
    if (ours && struck())
        return -1;
    int status = REAL(rename)(from, to);
    if (ours && !status) {
        char both[2 * PATH_MAX];
        int n = snprintf(both, sizeof both, "%s%c%s", from, 10, to);
        put('r', 0, 0, both, (size_t)n);
    }
    return status;
}

int unlink(const char *path)
{
    if (below(path) && struck())
        return -1;
    int status = REAL(unlink)(path);
    if (below(path) && !status)
        put('u', 0, 0, path, strlen(path));
    return status;
}

int mkdir(const char *path, mode_t mode)
{
    if (below(path) && struck())
        return -1;
    int status = REAL(mkdir)(path, mode);
    struct stat facts;
    if (below(path) && !status && !stat(path, &facts))
        put('d', (int64_t)facts.st_ino, 0, path, strlen(path));
    return status;
}
