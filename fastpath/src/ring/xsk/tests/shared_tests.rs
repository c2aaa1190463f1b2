//! One registration for all sockets that can share it, and what is done where they cannot.

use super::*;
use crate::ring::xsk::sys::seam;

/// Queues of each interface.
const QUEUES: usize = 3;

/// A part of an area, as NICs and links have it.
fn in_area() -> Memory {
    let area = Arc::new(Area::reserve(AREA_BYTES).unwrap());
    area.map_anonymous(AREA_BYTES).unwrap();
    let umem = same(&area);
    Memory { area, umem }
}

/// What another user of that part has.
fn same(area: &Arc<Area>) -> Umem {
    let settings = UmemSettings::default();
    // SAFETY: the tests make no references to the area.
    unsafe { Umem::in_area(area, 0, AREA_BYTES as u64, settings) }.unwrap()
}

fn usage(registrations: u64, registered_again: u64) -> UmemUse {
    UmemUse {
        registrations,
        registered_bytes: registrations * AREA_BYTES as u64,
        registered_again,
    }
}

/// Sockets on all queues of `a0` and `a1`, with a program that leads frames to those of `a1`.
struct Sockets {
    near: Vec<XskSocket>,
    far: Vec<XskSocket>,
    program: XdpProgram,
}

impl Sockets {
    fn open(near: &Umem, far: &Umem) -> Self {
        let all = |umem: &Umem, interface: &str| -> Vec<_> {
            let queues = 0..QUEUES as u32;
            let each = |queue| bind(umem, interface, queue, &small_rings());
            queues.map(each).collect()
        };
        let (near, far) = (all(near, "a0"), all(far, "a1"));
        let program = program_for("a1", AttachMode::Driver, &far.iter().collect::<Vec<_>>());
        let mut sockets = Self { near, far, program };
        (0..QUEUES).for_each(|queue| sockets.fill(queue));
        sockets
    }

    fn fill(&mut self, queue: usize) {
        let chunk = CHUNKS_AT + queue as u64 * 4096;
        assert!(self.far[queue].fill(chunk).unwrap());
        self.far[queue].submit_fill();
    }

    /// A frame by this queue arrives by the same queue.
    fn carry(&mut self, memory: &Memory, queue: usize) {
        let (offset, sent) = (1000 * queue as u64, frame(300, queue as u8));
        memory.write(offset, &sent);
        send(&mut self.near[queue], &[(offset, 300)]);
        assert_eq!(receive(memory, &mut self.far[queue]).0, sent);
        assert_eq!(complete(&mut self.near[queue], 1), [offset]);
    }
}

#[test]
fn all_queues_have_one_registration_as_long_as_any_is_open() {
    with_veth(QUEUES as u32, 1500, || {
        let memory = in_area();
        let mut sockets = Sockets::open(&memory.umem, &same(&memory.area));
        let each = |sockets: &mut Sockets| {
            (0..QUEUES).for_each(|queue| sockets.carry(&memory, queue));
        };
        each(&mut sockets);
        assert_eq!(seam::registrations(), 1);
        assert_eq!(memory.umem.usage(), usage(1, 0));

        // The one that has registered it goes, and the others go on; it comes back to what they have.
        for round in 0..3 {
            drop(sockets.near.remove(0));
            sockets
                .near
                .insert(0, bind(&memory.umem, "a0", 0, &small_rings()));
            each(&mut sockets);
            let queue = round % QUEUES;
            drop(sockets.far.remove(queue));
            let anew = bind(&memory.umem, "a1", queue as u32, &small_rings());
            sockets
                .program
                .set_guest_socket(queue as u32, anew.as_fd())
                .unwrap();
            sockets.far.insert(queue, anew);
            sockets.fill(queue);
            each(&mut sockets);
        }
        sockets.near.truncate(1);
        sockets.far.truncate(1);
        sockets.carry(&memory, 0);
        assert_eq!(seam::registrations(), 1);
        assert_eq!(memory.umem.usage(), usage(1, 0));

        // Nobody has it any more.
        drop(sockets);
        assert_eq!(memory.umem.usage(), usage(0, 0));
        let _again = bind(&memory.umem, "a0", 0, &small_rings());
        assert_eq!(seam::registrations(), 2);
        assert_eq!(memory.umem.usage(), usage(1, 0));
    });
}

/// On whatever thread they are opened.
#[test]
fn threads_that_open_at_once_register_once() {
    with_veth(QUEUES as u32, 1500, || {
        let area = Arc::new(Area::reserve(AREA_BYTES).unwrap());
        area.map_anonymous(AREA_BYTES).unwrap();
        // Threads that are made here are in this network namespace.
        let open = |queue| {
            let area = &area;
            move || {
                let socket = bind(&same(area), "a0", queue, &small_rings());
                (socket, seam::registrations())
            }
        };
        let opened: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..QUEUES as u32).map(|n| scope.spawn(open(n))).collect();
            let done = threads.into_iter().map(|thread| thread.join().unwrap());
            done.collect()
        });
        assert_eq!(opened.iter().map(|(_, made)| made).sum::<u32>(), 1);
        assert_eq!(same(&area).usage(), usage(1, 0));
        drop(opened);
        // Nobody has it any more, so this is a new one.
        assert_eq!(seam::registrations(), 0);
        assert_eq!(same(&area).usage(), usage(1, 0));
        assert_eq!(seam::registrations(), 1);
    });
}

#[test]
fn a_socket_whose_interface_is_gone_lends_nothing() {
    with_veth(1, 1500, || {
        ip("link add b0 type veth peer name b1");
        ip("link set b0 up");
        ip("link set b1 up");
        let memory = in_area();
        let stale = bind(&memory.umem, "a0", 0, &small_rings());
        ip("link del a0");
        let fresh = bind(&memory.umem, "b0", 0, &small_rings());
        assert_eq!(memory.umem.usage(), usage(2, 1));
        // The one is asked in vain, the other lends.
        let other = bind(&memory.umem, "b1", 0, &small_rings());
        assert_eq!(seam::registrations(), 2);
        drop(stale);
        assert_eq!(memory.umem.usage(), usage(1, 1));
        drop((fresh, other));
        assert_eq!(memory.umem.usage(), usage(0, 1));
    });
}

#[test]
fn where_the_kernel_refuses_to_share_each_socket_registers_and_all_goes_on() {
    with_veth(QUEUES as u32, 1500, || {
        let memory = in_area();
        seam::refuse_sharing(Some(libc::EINVAL));
        let mut sockets = Sockets::open(&memory.umem, &memory.umem);
        let all = 2 * QUEUES as u64;
        assert_eq!(memory.umem.usage(), usage(all, all - 1));
        (0..QUEUES).for_each(|queue| sockets.carry(&memory, queue));
        // A queue that is not there costs no registration.
        let interface = Interface::find("a0").unwrap();
        let none = XskSocket::bind(&memory.umem, &interface, 9, &small_rings()).unwrap_err();
        assert!(matches!(none, XskError::NoQueue { .. }), "{none}");
        assert_eq!(u64::from(seam::registrations()), all);

        // What is no question of sharing is none.
        drop(sockets.near.pop());
        seam::refuse_sharing(Some(libc::EPERM));
        let last = QUEUES as u32 - 1;
        let refused = XskSocket::bind(&memory.umem, &interface, last, &small_rings());
        let refused = refused.unwrap_err();
        assert!(matches!(refused, XskError::NotPermitted(_)), "{refused}");
        assert_eq!(u64::from(seam::registrations()), all);
        seam::refuse_sharing(None);
        sockets
            .near
            .push(bind(&memory.umem, "a0", last, &small_rings()));
        sockets.carry(&memory, QUEUES - 1);
        assert_eq!(memory.umem.usage(), usage(all - 1, all - 1));
    });
}

#[test]
fn other_options_have_their_own_registration_if_the_kernel_would_not_heed_them() {
    with_veth(4, 1500, || {
        let memory = in_area();
        let one_piece = BindOptions {
            multi_buffer: false,
            ..small_rings()
        };
        let unasked = BindOptions {
            need_wakeup: false,
            ..small_rings()
        };
        let mut sockets = Vec::new();
        for (queue, options, registrations) in [
            (0, small_rings(), 1),
            (1, one_piece, 1),
            (2, unasked, 2),
            (3, small_rings(), 2),
        ] {
            sockets.push(bind(&memory.umem, "a0", queue, &options));
            let again = registrations - 1;
            assert_eq!(memory.umem.usage(), usage(registrations, again), "{queue}");
        }
        // One that takes frames in several pieces does not get them from one that does not.
        let other = in_area();
        sockets.push(bind(&other.umem, "a1", 0, &one_piece));
        sockets.push(bind(&other.umem, "a1", 1, &small_rings()));
        assert_eq!(other.umem.usage(), usage(2, 1));
    });
}

/// Gives this thread to a user of its own, who may open raw sockets and nothing else: what others have locked does not
/// count for it.
fn be_somebody_else() {
    // SAFETY: numbers only; the raw call changes this thread alone.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0), 0);
        let user = 0x6000_0000 + std::process::id();
        assert_eq!(libc::syscall(libc::SYS_setresuid, user, user, user), 0);
    }
    keep_raw_sockets_only();
}

/// The limit is the process's, so another process is limited.
#[test]
fn memory_that_may_be_locked_once_is_enough_for_all_queues() {
    const CHILD: &str = "COLO_TEST_UMEM_MEMLOCK";
    let test =
        "ring::xsk::tests::shared_tests::memory_that_may_be_locked_once_is_enough_for_all_queues";
    if std::env::var_os(CHILD).is_none() {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args([test, "--exact", "--nocapture"]).env(CHILD, "1");
        let output = child.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{output:?}"
        );
        return;
    }
    with_veth(QUEUES as u32, 1500, || {
        let memory = in_area();
        let mut sockets = Sockets::open(&memory.umem, &memory.umem);
        drop((sockets.near, sockets.far.pop()));
        let limit = libc::rlimit {
            rlim_cur: AREA_BYTES as u64 * 3 / 2,
            rlim_max: AREA_BYTES as u64 * 3 / 2,
        };
        // SAFETY: reads one rlimit.
        let done = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
        assert_eq!(done, 0);
        be_somebody_else();

        let umem = in_area().umem;
        let near: Vec<_> = (0..QUEUES as u32)
            .map(|queue| bind(&umem, "a0", queue, &small_rings()))
            .collect();
        assert_eq!(umem.usage(), usage(1, 0));
        let a1 = Interface::find("a1").unwrap();
        let last = QUEUES as u32 - 1;
        let try_last = || loop {
            match XskSocket::bind(&umem, &a1, last, &small_rings()) {
                Err(XskError::Busy { .. }) => std::thread::yield_now(),
                done => return done,
            }
        };
        // The limit is one: nobody else can have as much, nor a socket that does not share.
        let area = Arc::new(Area::reserve(AREA_BYTES).unwrap());
        area.map_anonymous(AREA_BYTES).unwrap();
        let other = register(&area, UmemSettings::default()).unwrap_err();
        assert!(other.to_string().contains("once for all queues"), "{other}");
        seam::refuse_sharing(Some(libc::EINVAL));
        let refused = try_last().unwrap_err();
        let is_again = matches!(refused, XskError::LockedMemory { again: true, .. });
        assert!(is_again, "{refused}");
        assert!(refused.to_string().contains("4 MiB"), "{refused}");
        assert!(refused.to_string().contains("once more"), "{refused}");
        seam::refuse_sharing(None);
        let shared = try_last().unwrap();
        assert_eq!(umem.usage(), usage(1, 0));
        drop((near, shared));
    });
}
