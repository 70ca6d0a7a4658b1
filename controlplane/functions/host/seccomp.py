"""Which system calls a function may make: a list of what is allowed, made by libseccomp into a filter for bubblewrap.

What is not on the list fails with ENOSYS, as in a kernel that lacks it, which is what C libraries and runtimes are
prepared for. So a call that a later kernel adds is closed until somebody opens it here. libseccomp is asked by its C
API, because its Python bindings are made for the distribution's Python only.
"""

import ctypes
import errno
import socket
import tempfile
import termios
from collections.abc import Iterable

_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_EQUAL, _MASKED_EQUAL = 4, 7
_UNKNOWN_CALL = -1

_LOW_HALF = 0xFFFFFFFF  # the kernel looks at no more of an `int`, but the filter would see the rest
# The CLONE_NEW… flags: a new user namespace gives all capabilities in it, and so much more of the kernel to attack.
_NAMESPACES = 0x00000080 | 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000

_FILES = """
    access chdir chmod chown close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64
    fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fremovexattr
    fsetxattr fstat fstatfs fsync ftruncate futimesat getcwd getdents getdents64 getxattr inotify_add_watch
    inotify_init inotify_init1 inotify_rm_watch lchown lgetxattr link linkat listxattr llistxattr lremovexattr lseek
    lsetxattr lstat memfd_create mkdir mkdirat mknod mknodat newfstatat open openat openat2 pipe pipe2 pread64 preadv
    preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv removexattr rename renameat renameat2
    rmdir sendfile setxattr splice stat statfs statx symlink symlinkat sync_file_range tee truncate umask unlink
    unlinkat utime utimensat utimes vmsplice write writev
"""
_WAITING = """
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd
    eventfd2 poll ppoll pselect6 select signalfd signalfd4 timerfd_create timerfd_gettime timerfd_settime
"""
_MEMORY = """
    brk madvise membarrier mincore mlock mlock2 mlockall mmap mprotect mremap msync munlock munlockall munmap
    pkey_alloc pkey_free pkey_mprotect
"""
_PROCESSES = """
    alarm arch_prctl capget clock_getres clock_gettime clock_nanosleep execve execveat exit exit_group fork futex
    futex_waitv get_robust_list getcpu getegid geteuid getgid getgroups getitimer getpgid getpgrp getpid getppid
    getpriority getrandom getresgid getresuid getrlimit getrusage getsid gettid gettimeofday getuid kill nanosleep
    pause pidfd_open pidfd_send_signal prctl prlimit64 restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask
    rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max
    sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
    sched_setaffinity sched_yield set_robust_list set_tid_address setitimer setpgid setpriority setrlimit setsid
    sigaltstack sysinfo tgkill time timer_create timer_delete timer_getoverrun timer_gettime timer_settime times tkill
    uname vfork wait4 waitid
"""
_SOCKETS = """
    accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmmsg recvmsg sendmmsg sendmsg
    sendto setsockopt shutdown
"""

# Not AF_VSOCK above all, which no network namespace holds back: it reaches the hypervisor's host.
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
# Of ioctl() only what runtimes ask; TIOCSTI would type into a terminal.
_FIOCLEX, _FIONCLEX = 0x5451, 0x5450
_IOCTLS = (termios.FIONREAD, termios.FIONBIO, _FIOCLEX, _FIONCLEX, termios.TCGETS, termios.TIOCGWINSZ)


class NoSeccomp(Exception):
    """libseccomp is not there, or will not make the filter."""


class _Comparison(ctypes.Structure):
    """`struct scmp_arg_cmp`: what an argument must be for a rule to hold."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def make_filter() -> bytes:
    """Return the filter as BPF, as the kernel takes it; raises NoSeccomp."""
    library = _load()
    context = library.seccomp_init(_ERRNO | errno.ENOSYS)
    if not context:
        raise NoSeccomp("libseccomp gives no filter")
    try:
        for name in (_FILES + _WAITING + _MEMORY + _PROCESSES + _SOCKETS).split():
            _allow(library, context, name)
        _allow(library, context, "clone", [_Comparison(0, _MASKED_EQUAL, _NAMESPACES, 0)])
        for family in _FAMILIES:
            _allow(library, context, "socket", [_Comparison(0, _MASKED_EQUAL, _LOW_HALF, family)])
        _allow(library, context, "socketpair", [_Comparison(0, _MASKED_EQUAL, _LOW_HALF, socket.AF_UNIX)])
        for request in _IOCTLS:
            _allow(library, context, "ioctl", [_Comparison(1, _MASKED_EQUAL, _LOW_HALF, request)])
        with tempfile.TemporaryFile() as file:
            if library.seccomp_export_bpf(context, file.fileno()) != 0:
                raise NoSeccomp("libseccomp cannot write its filter")
            file.seek(0)
            return file.read()
    finally:
        library.seccomp_release(context)


def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError as error:
        raise NoSeccomp("There is no libseccomp.so.2: apt-get install libseccomp2") from error
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Comparison),
    ]
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return library


def _allow(library: ctypes.CDLL, context: int, name: str, comparisons: Iterable[_Comparison] = ()) -> None:
    """Allow a call if all comparisons hold; one that this libseccomp does not know stays closed."""
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number == _UNKNOWN_CALL:
        return
    holding = list(comparisons)
    array = (_Comparison * len(holding))(*holding)
    if (error := library.seccomp_rule_add_array(context, _ALLOW, number, len(holding), array)) != 0:
        raise NoSeccomp(f"libseccomp refuses a rule for {name}: error {-error}")
