//! The two hypervisors and the stream between them, with QEMU's traps: a guest that was not told to stand runs again by itself when the
//! copy fails late; a copy with nothing left completes by itself; the acknowledgement may be lost after the state was loaded.

use super::{At, Pair};

/// What a guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Guest {
    /// It runs.
    Running,
    /// It stands, with its memory.
    Standing,
    /// A container without memory of its own.
    Loading,
    /// There is no process.
    Dead,
}

/// What an agent asks of its hypervisor. It is done in order, and later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Let the guest run.
    Cont,
    /// Make it stand.
    Stand,
    /// Tell of the copy.
    Attend,
    /// Give the copy up.
    CancelCopy,
    /// End the process.
    Kill,
}

/// What a hypervisor tells its agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    NearlyDone,
    Stood { settled: bool },
    Copied,
    CopyFailed,
    Died,
    Loaded,
    LoadFailed,
}

/// The stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copy {
    /// How far it is.
    pub(crate) stage: CopyStage,
    /// The guest ran when completion began: it runs again by itself if that fails.
    resumes: bool,
}

/// How far the stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyStage {
    /// Memory is sent in rounds.
    Rounds,
    /// Little is left; the agent was told so.
    Nearly,
    /// The source completes: its guest stands, device state is on its way.
    Completing,
    /// The destination has loaded all; its acknowledgement is on its way.
    Loaded,
    /// The source has the acknowledgement.
    Completed,
    /// It broke, or was given up.
    Failed,
}

impl Default for Copy {
    fn default() -> Self {
        Self {
            stage: CopyStage::Rounds,
            resumes: false,
        }
    }
}

impl Copy {
    /// Whether a break can still be felt.
    pub(crate) fn is_open(&self) -> bool {
        !matches!(self.stage, CopyStage::Completed | CopyStage::Failed)
    }

    /// Whether it goes on by itself.
    pub(crate) fn can_go_on(&self, source: Guest, destination: Guest) -> bool {
        self.is_open() && source != Guest::Dead && destination != Guest::Dead
    }
}

impl Pair {
    /// The stream goes one step further. It completes by itself whether or not the agent has made the guest stand.
    pub(crate) fn copy_on(&mut self) {
        match self.copy.stage {
            CopyStage::Rounds => {
                self.copy.stage = CopyStage::Nearly;
                self.a.tell(Told::NearlyDone);
            }
            CopyStage::Nearly => {
                self.copy.stage = CopyStage::Completing;
                self.copy.resumes = self.a.guest == Guest::Running;
                if self.copy.resumes {
                    self.a.guest = Guest::Standing;
                    self.a.tell(Told::Stood { settled: false });
                }
            }
            CopyStage::Completing => {
                self.copy.stage = CopyStage::Loaded;
                self.b.guest = Guest::Standing;
                self.b.tell(Told::Loaded);
            }
            CopyStage::Loaded => {
                self.copy.stage = CopyStage::Completed;
                self.a.tell(Told::Copied);
            }
            CopyStage::Completed | CopyStage::Failed => {}
        }
    }

    /// The stream is cut: each end that still needs it sees that.
    pub(crate) fn break_stream(&mut self) {
        if !self.copy.is_open() {
            return;
        }
        let loaded = self.copy.stage == CopyStage::Loaded;
        self.copy.stage = CopyStage::Failed;
        if self.a.guest != Guest::Dead {
            if self.copy.resumes {
                self.a.guest = Guest::Running;
            }
            self.a.tell(Told::CopyFailed);
        }
        if self.b.guest == Guest::Loading && !loaded {
            self.b.tell(Told::LoadFailed);
        }
    }

    /// A process dies.
    pub(crate) fn end_guest(&mut self, at: At) {
        match at {
            At::A => {
                self.a.guest = Guest::Dead;
                self.a.asked.clear();
                self.a.tell(Told::Died);
            }
            At::B => {
                self.b.guest = Guest::Dead;
                self.b.asked.clear();
                self.b.tell(Told::Died);
            }
        }
        self.break_stream();
    }

    /// A hypervisor does what it was asked first.
    pub(crate) fn obey(&mut self, at: At) {
        let asked = match at {
            At::A => self.a.asked.pop_front(),
            At::B => self.b.asked.pop_front(),
        };
        match (asked, at) {
            (Some(Asked::Kill), at) => self.end_guest(at),
            (Some(Asked::Cont), At::A) if self.copy.stage != CopyStage::Completing => self.cont_source(),
            (Some(Asked::Cont), At::B) if self.b.guest == Guest::Standing => self.b.guest = Guest::Running,
            (Some(Asked::Stand), At::A) => self.stand_source(),
            (Some(Asked::CancelCopy), At::A) => self.cancel_copy(),
            (Some(Asked::Attend), At::A) => self.attend(),
            _ => {}
        }
    }

    fn cont_source(&mut self) {
        if self.a.guest == Guest::Standing {
            self.a.guest = Guest::Running;
        }
    }

    fn stand_source(&mut self) {
        // Once completion has begun of a running guest, `stop` changes nothing about what a failure does.
        let unsettled = self.copy.resumes && matches!(self.copy.stage, CopyStage::Completing | CopyStage::Loaded);
        if self.a.guest == Guest::Running {
            self.a.guest = Guest::Standing;
        }
        self.a.tell(Told::Stood { settled: !unsettled });
    }

    /// A cancel of a completed copy comes too late; of a failed one there is nothing more to say than that.
    fn cancel_copy(&mut self) {
        match self.copy.stage {
            CopyStage::Completed => self.a.tell(Told::Copied),
            CopyStage::Failed => self.a.tell(Told::CopyFailed),
            _ => self.break_stream(),
        }
    }

    fn attend(&mut self) {
        match self.copy.stage {
            CopyStage::Rounds => {}
            CopyStage::Nearly => self.a.tell(Told::NearlyDone),
            CopyStage::Completing | CopyStage::Loaded => self.a.tell(Told::Stood {
                settled: !self.copy.resumes,
            }),
            CopyStage::Completed => self.a.tell(Told::Copied),
            CopyStage::Failed => self.a.tell(Told::CopyFailed),
        }
    }
}
