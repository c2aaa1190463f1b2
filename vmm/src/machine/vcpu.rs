//! One thread per vCPU, and the handle by which the others pause, read and write it.
//!
//! Invariants: only the thread touches the vCPU's descriptor; a paused vCPU has no port or register
//! access pending, so its state is complete; a kick is never lost: the command is in the channel
//! before `immediate_exit` is set and the eventfd and the signal are sent, and the thread clears
//! `immediate_exit` and the eventfd before it looks into the channel.
//!
//! Does not answer exits; the platform does.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use colo_fastpath::processor;
use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, Msrs, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use tracing::{debug, warn};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::duty::Duty;
use super::exits::{ExitStats, Next, Platform, VmExit, lock};
use super::kvm::KvmError;
use super::urgent::Raised;
use super::vcpu_shape::VcpuShape;
use super::vcpu_state::{TscTarget, VcpuState};
use super::waits::Waits;
use crate::checkpoint::dirty::DirtyTracker;

/// Base of the code segment and instruction pointer of a vCPU that was reset.
const RESET_VECTOR: (u64, u64) = (0xffff_0000, 0xfff0);

/// A vCPU could not be reached or refused.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The thread has ended.
    #[error("the thread of a vCPU has ended")]
    Gone,
    /// The thread could not be started.
    #[error("no thread for a vCPU: {0}")]
    Thread(#[from] io::Error),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

type Task = Box<dyn FnOnce(&VcpuFd, &VcpuShape) + Send>;
/// A record, or why there is none; the memory comes back in both cases.
type Saved = (Vec<u8>, Result<(), KvmError>);

/// Room for a record at first.
pub(crate) const VCPU_RECORD_BYTES: usize = 16 << 10;

enum Command {
    Pause(Sender<()>),
    Resume,
    /// Only while paused.
    Task(Task),
    /// Only while paused: a record into this memory.
    Save(Vec<u8>),
    /// A state has been written: an ended vCPU may run again.
    Revive,
    /// It may run this share of the time, in percent.
    Throttle(u8),
    Stop,
}

/// Controls one vCPU thread.
#[derive(Debug)]
pub struct VcpuHandle {
    commands: Sender<Command>,
    kick: Arc<Kick>,
    stats: Arc<ExitStats>,
    /// Microseconds that the vCPU was kept standing.
    stood: Arc<AtomicU64>,
    shape: Arc<VcpuShape>,
    saves: Mutex<Saves>,
    thread: Mutex<Option<JoinHandle<()>>>,
    raised: Raised,
}

/// Records on their way from the thread.
#[derive(Debug)]
struct Saves {
    answers: Receiver<Saved>,
    /// One is ordered and not fetched.
    ordered: bool,
    /// The memory for the next.
    spare: Vec<u8>,
}

impl VcpuHandle {
    /// Starts the thread of a vCPU, paused. `on_end` is called on it when the guest ends.
    pub(super) fn spawn(
        name: String,
        mut fd: VcpuFd,
        shape: VcpuShape,
        platform: Arc<Platform>,
        dirty: Arc<DirtyTracker>,
        on_end: impl Fn(VmExit) + Send + 'static,
    ) -> Result<Self, VcpuError> {
        register_signal_handler(SIGRTMIN(), ignore_signal)
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        let kick = Arc::new(Kick::new(&mut fd)?);
        let stats = Arc::new(ExitStats::default());
        let stood = Arc::new(AtomicU64::new(0));
        let (commands, inbox) = channel();
        let (saved, answers) = sync_channel(1);
        let shape = Arc::new(shape);
        let vcpu = Vcpu {
            fd,
            state: VcpuState::empty(&shape),
            batch: shape.msrs.batch()?,
            shape: shape.clone(),
            saved,
            platform,
            dirty,
            inbox,
            kick: kick.clone(),
            stats: stats.clone(),
            mode: Mode::Paused,
            duty: Duty::new(stood.clone()),
            waits: Waits::none(),
            on_end: Box::new(on_end),
        };
        let thread = thread::Builder::new()
            .name(name)
            .spawn(move || vcpu.run())?;
        Ok(Self {
            commands,
            kick,
            stats,
            stood,
            shape,
            saves: Mutex::new(Saves {
                answers,
                ordered: false,
                spare: Vec::with_capacity(VCPU_RECORD_BYTES),
            }),
            thread: Mutex::new(Some(thread)),
            raised: Raised::default(),
        })
    }

    /// Asks for a pause; the receiver answers when the vCPU stands still.
    pub(super) fn begin_pause(&self) -> Result<Receiver<()>, VcpuError> {
        let (reply, answer) = channel();
        self.send(Command::Pause(reply))?;
        Ok(answer)
    }

    /// Stops the vCPU between two instructions, with no I/O pending, and waits for that.
    pub fn pause(&self) -> Result<(), VcpuError> {
        self.begin_pause()?.recv().map_err(|_| VcpuError::Gone)
    }

    /// Lets it run; a guest that has ended stays ended.
    pub fn resume(&self) -> Result<(), VcpuError> {
        self.send(Command::Resume)
    }

    /// Lets it run this share of the time, in percent; 0: it stands still until told otherwise. Pauses go on as before.
    pub(super) fn throttle(&self, run_pct: u8) -> Result<(), VcpuError> {
        self.send(Command::Throttle(run_pct))
    }

    /// Lets its thread go before others, or no longer.
    pub(super) fn hurry(&self, on: bool) {
        if let Some(thread) = &*lock(&self.thread) {
            self.raised.of(thread, on);
        }
    }

    /// For how long it was kept standing so far.
    pub(super) fn throttled_us(&self) -> u64 {
        self.stood.load(Ordering::Relaxed)
    }

    /// Reads the state of a paused vCPU.
    pub fn save(&self) -> Result<VcpuState, VcpuError> {
        Ok(self.execute(VcpuState::read)??)
    }

    /// Orders the record of a vCPU that is paused or about to be; [`VcpuHandle::fetch_record`] has it.
    pub(super) fn order_record(&self) -> Result<(), VcpuError> {
        let mut saves = lock(&self.saves);
        if !saves.ordered {
            let memory = std::mem::take(&mut saves.spare);
            self.send(Command::Save(memory))?;
            saves.ordered = true;
        }
        Ok(())
    }

    /// Forgets a record that was ordered and not fetched.
    pub(super) fn discard_record(&self) {
        let mut saves = lock(&self.saves);
        if std::mem::take(&mut saves.ordered)
            && let Ok((memory, _)) = saves.answers.recv()
        {
            saves.spare = memory;
        }
    }

    /// The record that was ordered, or a new one of a paused vCPU. The memory of `into` is used for the
    /// next.
    pub(super) fn fetch_record(&self, into: &mut Vec<u8>) -> Result<(), VcpuError> {
        self.order_record()?;
        let mut saves = lock(&self.saves);
        saves.ordered = false;
        let (record, outcome) = saves.answers.recv().map_err(|_| VcpuError::Gone)?;
        saves.spare = std::mem::replace(into, record);
        Ok(outcome?)
    }

    /// Replaces the state of a paused vCPU. An ended one is paused afterwards.
    pub(super) fn restore(&self, state: VcpuState, tsc: TscTarget) -> Result<(), VcpuError> {
        self.execute(move |fd, shape| state.write(fd, shape, tsc))??;
        self.send(Command::Revive)
    }

    /// What this vCPU has.
    pub(super) fn shape(&self) -> &VcpuShape {
        &self.shape
    }

    /// Runs `task` on the thread, while paused.
    pub(super) fn execute<R: Send + 'static>(
        &self,
        task: impl FnOnce(&VcpuFd, &VcpuShape) -> R + Send + 'static,
    ) -> Result<R, VcpuError> {
        let (reply, answer) = channel();
        self.send(Command::Task(Box::new(move |fd, shape| {
            // A caller that no longer waits is no concern of the vCPU's.
            let _ = reply.send(task(fd, shape));
        })))?;
        answer.recv().map_err(|_| VcpuError::Gone)
    }

    pub(super) fn stats(&self) -> &ExitStats {
        &self.stats
    }

    /// Ends the thread and waits for it.
    pub fn stop(&self) {
        let _ = self.send(Command::Stop);
        if let Some(thread) = lock(&self.thread).take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a vCPU panicked");
        }
    }

    fn send(&self, command: Command) -> Result<(), VcpuError> {
        self.commands.send(command).map_err(|_| VcpuError::Gone)?;
        self.kick.raise();
        if let Some(thread) = &*lock(&self.thread) {
            // The thread is not joined, so its id is valid even if it has just ended.
            let _ = thread.kill(SIGRTMIN());
        }
        Ok(())
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The signal only has to interrupt `KVM_RUN`.
extern "C" fn ignore_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// What brings a vCPU thread back: `immediate_exit` for one about to enter the guest, an eventfd for
/// one in the sleep port. The signal for one inside the guest is the handle's.
#[derive(Debug)]
struct Kick {
    run: NonNull<kvm_run>,
    run_bytes: usize,
    event: EventFd,
}

// SAFETY: the mapping is private to this structure and only its `immediate_exit` byte is accessed,
// atomically.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    /// Maps the vCPU's run structure a second time, so that other threads reach it independently of
    /// the descriptor's life.
    fn new(fd: &mut VcpuFd) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let run_bytes = size_of::<kvm_run>().next_multiple_of(4096);
        // SAFETY: a fresh shared mapping of the vCPU's run area, which is at least this long; KVM
        // and the vCPU thread write it too, but nobody else through this mapping.
        let run = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                run_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if run == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let run = NonNull::new(run.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            run,
            run_bytes,
            event,
        })
    }

    fn raise(&self) {
        self.set_immediate_exit(1);
        // A full counter is a kick already.
        let _ = self.event.write(1);
    }

    fn clear(&self) {
        let _ = self.event.read();
        self.set_immediate_exit(0);
    }

    fn set_immediate_exit(&self, value: u8) {
        // SAFETY: points into the mapping that lives as long as `self`; all accesses of this
        // process are atomic, the kernel only reads the byte. SeqCst orders it against the channel.
        unsafe {
            let byte = &raw mut (*self.run.as_ptr()).immediate_exit;
            AtomicU8::from_ptr(byte).store(value, Ordering::SeqCst);
        }
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `new`, unmapped once, with no reference left.
        unsafe { libc::munmap(self.run.as_ptr().cast(), self.run_bytes) };
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Paused,
    Running,
    /// The guest has powered off or cannot go on.
    Ended,
}

struct Vcpu {
    fd: VcpuFd,
    shape: Arc<VcpuShape>,
    /// Where records are made, and the memory to read MSRs into.
    state: VcpuState,
    batch: Msrs,
    saved: SyncSender<Saved>,
    platform: Arc<Platform>,
    dirty: Arc<DirtyTracker>,
    inbox: Receiver<Command>,
    kick: Arc<Kick>,
    stats: Arc<ExitStats>,
    mode: Mode,
    duty: Duty,
    waits: Waits,
    on_end: Box<dyn Fn(VmExit) + Send>,
}

impl Vcpu {
    fn run(mut self) {
        self.waits = Waits::of_this_thread();
        while self.obey() {
            if let Some(time) = self.duty.must_stand() {
                self.stand(time);
                continue;
            }
            match self.step() {
                Next::Run => {}
                Next::Sleep(limit_us) => self.sleep(limit_us),
                Next::End(exit) => self.end(exit),
            }
        }
        (self.on_end)(VmExit::Stopped);
    }

    /// Handles what others ask for, and waits for it unless running; `false` to end.
    fn obey(&mut self) -> bool {
        loop {
            self.kick.clear();
            let command = match self.mode {
                Mode::Running => match self.inbox.try_recv() {
                    Ok(command) => command,
                    Err(_) => return true,
                },
                Mode::Paused | Mode::Ended => match self.inbox.recv() {
                    Ok(command) => command,
                    Err(_) => return false,
                },
            };
            match command {
                Command::Pause(reply) => {
                    self.pause();
                    let _ = reply.send(());
                }
                Command::Resume if self.mode == Mode::Paused => self.mode = Mode::Running,
                Command::Resume => {}
                Command::Task(task) => task(&self.fd, &self.shape),
                Command::Save(memory) => self.save(memory),
                Command::Revive => self.mode = Mode::Paused,
                Command::Throttle(run_pct) => self.duty.set(run_pct),
                Command::Stop => return false,
            }
        }
    }

    /// Enters the guest once.
    fn step(&mut self) -> Next {
        let entered = self.duty.enter();
        let next = match self.fd.run() {
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => self.ring_full(),
            Ok(exit) => self.platform.handle(exit, &self.stats),
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                self.stats.signal.add(1);
                Next::Run
            }
            Err(e) => Next::End(VmExit::Fault {
                what: format!("KVM_RUN failed: {e}"),
                rip: None,
            }),
        };
        self.duty.leave(entered);
        self.stats.total.add(1);
        next
    }

    fn save(&mut self, memory: Vec<u8>) {
        let read = self.state.read_from(&self.fd, &self.shape, &mut self.batch);
        let record = match &read {
            Ok(()) => self.state.write_record(memory),
            Err(_) => memory,
        };
        // The handle is gone when nobody listens.
        let _ = self.saved.send((record, read));
    }

    /// KVM does not enter the guest until the dirty rings have room.
    fn ring_full(&self) -> Next {
        self.stats.dirty_ring_full.add(1);
        match self.dirty.ring_full() {
            Ok(()) => Next::Run,
            Err(e) => Next::End(VmExit::Fault {
                what: e.to_string(),
                rip: None,
            }),
        }
    }

    /// Completes what the last exit left open: KVM does so on entry and then leaves at once.
    fn pause(&mut self) {
        while self.mode == Mode::Running {
            self.kick.set_immediate_exit(1);
            match self.fd.run() {
                // The dirty ring is emptied when the vCPU runs again, or before.
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {}
                // The access had more parts (a repeated string instruction).
                Ok(exit) => {
                    if let Next::End(exit) = self.platform.handle(exit, &self.stats) {
                        self.end(exit);
                    }
                }
                Err(e) if e.errno() == libc::EINTR => self.mode = Mode::Paused,
                Err(e) => {
                    let what = format!("KVM_RUN failed: {e}");
                    self.end(VmExit::Fault { what, rip: None });
                }
            }
        }
        self.kick.set_immediate_exit(0);
    }

    /// The sleep port: until a device interrupt, which is consumed, a kick, or the limit.
    fn sleep(&mut self, limit_us: u32) {
        let begun = self.duty.is_limited().then(Instant::now);
        let line = &self.platform.interrupt;
        let mut fds = [readable(line), readable(&self.kick.event)];
        let limit = (limit_us > 0).then(|| Duration::from_micros(limit_us.into()));
        // A pair's guests run for the same request; a guest that has no replica is best left to the kernel.
        if self.dirty.seems_on() {
            self.waits.lie_down();
        }
        wait(&mut fds, limit);
        if fds[0].revents != 0 {
            let _ = line.read();
            if self.waits.get_up() {
                self.move_over();
            }
        }
        if let Some(begun) = begun {
            self.duty.rested(begun.elapsed());
        }
    }

    /// Leaves a processor on which it waits for somebody else each time.
    #[cold]
    fn move_over(&self) {
        match processor::leave() {
            Ok(true) => self.stats.moves.add(1),
            Ok(false) => {}
            Err(e) => debug!("a vCPU cannot leave its processor: {e}"),
        }
    }

    /// Keeps the guest from running for so long, or until somebody wants something.
    fn stand(&mut self, time: Duration) {
        let begun = Instant::now();
        wait(&mut [readable(&self.kick.event)], Some(time));
        self.duty.stood(begun.elapsed());
    }

    /// Where the guest is. AMD-V loses that at a triple fault: KVM has put the vCPU to its reset vector then.
    fn place(&self) -> Option<u64> {
        let regs = self.fd.get_regs().ok()?;
        let sregs = self.fd.get_sregs().ok()?;
        let is_reset = (sregs.cs.base, regs.rip) == RESET_VECTOR;
        (!is_reset).then_some(regs.rip)
    }

    fn end(&mut self, exit: VmExit) {
        let exit = match exit {
            VmExit::Fault { what, .. } => {
                let rip = self.place();
                VmExit::Fault { what, rip }
            }
            other => other,
        };
        if let Err(e) = self.platform.flush_console() {
            warn!("the guest's console cannot be written: {e}");
        }
        self.mode = Mode::Ended;
        (self.on_end)(exit);
    }
}

fn readable(event: &EventFd) -> libc::pollfd {
    libc::pollfd {
        fd: event.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }
}

/// Until one of `fds` is ready, a signal, or the limit.
fn wait(fds: &mut [libc::pollfd], limit: Option<Duration>) {
    let limit = limit.map(|limit| libc::timespec {
        tv_sec: limit.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(limit.subsec_nanos()),
    });
    let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let count = fds.len() as libc::nfds_t;
    // SAFETY: pollfds and timespec live during the call, the count is that of the pollfds; no signal mask.
    unsafe { libc::ppoll(fds.as_mut_ptr(), count, limit, std::ptr::null()) };
}
