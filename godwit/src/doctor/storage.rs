//! The file systems under state and pools: room, kind, O_DIRECT, shared blocks, the pool's token.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, StatVfsMountFlags};

use super::{Check, Checks, Look, Role, Topic, topic};
use crate::out::units::show_bytes;

pub(super) const STATE_TOPICS: &[&Topic] = &[&topic::SPACE, &topic::FILE_SYSTEM];
const POOL_TOPICS: &[&Topic] = &[
    &topic::SPACE,
    &topic::FILE_SYSTEM,
    &topic::DIRECT_IO,
    &topic::REFLINK,
    &topic::POOL_TOKEN,
];

/// The token file of a pool, as the agent writes it.
const TOKEN: &str = ".godwit-pool";
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Sectors are 512 or 4096 bytes.
const SECTOR_BYTES: usize = 4096;

/// A directory, and what for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Directory {
    pub(super) path: PathBuf,
    use_: Use,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    State,
    Pool,
}

impl Directory {
    pub(super) fn topics(&self) -> &'static [&'static Topic] {
        match self.use_ {
            Use::State => STATE_TOPICS,
            Use::Pool => POOL_TOPICS,
        }
    }
}

/// The directories of this machine's roles.
pub(super) fn directories(look: &Look) -> Vec<Directory> {
    let has = |role| look.roles.contains(&role);
    let state = |path: &PathBuf| Directory {
        path: path.clone(),
        use_: Use::State,
    };
    let pool = |path: &PathBuf| Directory {
        path: path.clone(),
        use_: Use::Pool,
    };
    let mut directories = Vec::new();
    if has(Role::Controller) {
        directories.extend(look.places.controller.iter().map(state));
    }
    if has(Role::Agent) {
        directories.extend(look.places.agent.iter().map(state));
        directories.extend(look.places.pools.iter().map(pool));
    }
    directories
}

pub(super) fn look(look: &Look, directory: &Directory) -> Checks {
    let checks = match nearest(look, &directory.path) {
        Ok(place) => {
            let mut checks = vec![space(look, &place, directory.use_), file_system(&place, directory.use_)];
            if directory.use_ == Use::Pool {
                checks.extend([
                    direct_io(look, &place),
                    reflink(look, &place),
                    token(look, &directory.path),
                ]);
            }
            checks
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !look.is_root => {
            let forbidden = |topic: &&Topic| Check::needs_root(topic, "this user may not look there");
            directory.topics().iter().map(forbidden).collect()
        }
        Err(error) => {
            let mend = format!("see what is there: ls -ld {}", directory.path.display());
            let unusable = |topic: &&Topic| Check::problem(topic, format!("it cannot be used: {error}"), &mend);
            directory.topics().iter().map(unusable).collect()
        }
    };
    let about = directory.path.display().to_string();
    checks.into_iter().map(|check| check.about(&about)).collect()
}

/// The directory, or of those above it the first that is there: where it would be made.
struct Place {
    /// As it is opened.
    path: PathBuf,
    /// As it is called.
    shown: PathBuf,
    is_itself: bool,
}

impl Place {
    /// What was seen, and where, if not in the directory itself.
    fn seen(&self, text: &str) -> String {
        if self.is_itself {
            text.to_owned()
        } else {
            format!("not there yet; in {}: {text}", self.shown.display())
        }
    }
}

fn nearest(look: &Look, wanted: &Path) -> io::Result<Place> {
    for shown in wanted.ancestors() {
        let path = look.path(shown);
        match std::fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
            Ok(data) if !data.is_dir() => return Err(io::ErrorKind::NotADirectory.into()),
            Ok(_) => {
                return Ok(Place {
                    path,
                    shown: shown.to_owned(),
                    is_itself: shown == wanted,
                });
            }
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

fn unknown(topic: &Topic, place: &Place, error: impl std::fmt::Display) -> Check {
    Check::skipped(topic, place.seen(&format!("the file system does not tell: {error}"))).mend("see dmesg")
}

fn space(look: &Look, place: &Place, use_: Use) -> Check {
    match rustix::fs::statvfs(&place.path) {
        Err(error) => unknown(&topic::SPACE, place, error),
        Ok(found) => judge_space(
            look,
            place,
            use_,
            Room {
                free: found.f_bavail.saturating_mul(found.f_frsize),
                total: found.f_blocks.saturating_mul(found.f_frsize),
                // Some file systems make them as they go, and say 0 of 0.
                is_out_of_files: found.f_files > 0 && found.f_ffree == 0,
            },
        ),
    }
}

struct Room {
    free: u64,
    total: u64,
    is_out_of_files: bool,
}

fn judge_space(look: &Look, place: &Place, use_: Use, room: Room) -> Check {
    let topic = &topic::SPACE;
    let (least, good) = match use_ {
        Use::State => (100 * MIB, GIB),
        Use::Pool => (GIB, (room.total / 10).min(20 * GIB)),
    };
    let seen = place.seen(&format!("{} free of {}", show_bytes(room.free), show_bytes(room.total)));
    let usage = look.command(&format!(
        "du -xh --max-depth=2 {} | sort -h | tail",
        place.shown.display()
    ));
    let mend = format!("make room ({usage}), or enlarge the file system, or use another directory");
    if room.is_out_of_files {
        Check::problem(topic, format!("{seen}, but no more files can be made"), mend)
    } else if room.free < least {
        Check::problem(topic, seen, mend)
    } else if room.free < good {
        Check::warning(topic, seen, mend)
    } else {
        Check::ok(topic, seen)
    }
}

/// What a file system means for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Local,
    Network,
    Memory,
    Overlay,
}

/// By the magic numbers of statfs(2), which are 32 bits wide.
fn kind_of(magic: u32) -> (&'static str, Kind) {
    match magic {
        0xef53 => ("ext4", Kind::Local),
        0x5846_5342 => ("xfs", Kind::Local),
        0x9123_683e => ("btrfs", Kind::Local),
        0x2fc1_2fc1 => ("zfs", Kind::Local),
        0xca45_1a4e => ("bcachefs", Kind::Local),
        0xf2f5_2010 => ("f2fs", Kind::Local),
        0x6969 => ("nfs", Kind::Network),
        0xff53_4d42 | 0xfe53_4d42 => ("smb", Kind::Network),
        0x00c3_6400 => ("ceph", Kind::Network),
        0x0102_1997 => ("9p", Kind::Network),
        0x6573_5546 => ("fuse", Kind::Network),
        0x0116_1970 => ("gfs2", Kind::Network),
        0x7461_636f => ("ocfs2", Kind::Network),
        0x0102_1994 => ("tmpfs", Kind::Memory),
        0x8584_58f6 => ("ramfs", Kind::Memory),
        0x794c_7630 => ("overlay", Kind::Overlay),
        _ => ("of an unknown kind", Kind::Local),
    }
}

fn file_system(place: &Place, use_: Use) -> Check {
    let topic = &topic::FILE_SYSTEM;
    let found = rustix::fs::statfs(&place.path).and_then(|fs| Ok((fs, rustix::fs::statvfs(&place.path)?)));
    match found {
        Err(error) => unknown(topic, place, error),
        Ok((fs, vfs)) => {
            let is_read_only = vfs.f_flag.contains(StatVfsMountFlags::RDONLY);
            judge_file_system(place, use_, fs.f_type as u32, is_read_only)
        }
    }
}

fn judge_file_system(place: &Place, use_: Use, magic: u32, is_read_only: bool) -> Check {
    let topic = &topic::FILE_SYSTEM;
    let (name, kind) = kind_of(magic);
    let elsewhere = match use_ {
        Use::State => "use a directory on a local disk: --state DIR",
        Use::Pool => "use a directory on a disk: --pool NAME=DIR",
    };
    if is_read_only {
        let mend = format!("mount -o remount,rw (see dmesg for why it is so), or {elsewhere}");
        return Check::problem(topic, place.seen(&format!("{name}, mounted read-only")), mend);
    }
    match (kind, use_) {
        (Kind::Local, _) => Check::ok(topic, place.seen(name)),
        (Kind::Network, Use::Pool) => Check::ok(topic, place.seen(&format!("{name}: other hosts may share it"))),
        (Kind::Network, Use::State) => {
            Check::problem(topic, place.seen(&format!("{name}, a network file system")), elsewhere)
        }
        (Kind::Memory, _) => Check::warning(
            topic,
            place.seen(&format!("{name}: lost when the machine restarts")),
            elsewhere,
        ),
        (Kind::Overlay, _) => Check::warning(
            topic,
            place.seen(&format!("{name}: lost with the container")),
            elsewhere,
        ),
    }
}

/// A file without a name, so that nothing stays whatever happens; where the file system has none such, its name is gone at once.
fn nameless(directory: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => return Ok(file.into()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let path = directory.join(format!(".godwit-doctor-{}", uuid::Uuid::new_v4()));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

/// A buffer where O_DIRECT wants it.
#[repr(align(4096))]
struct Sector([u8; SECTOR_BYTES]);

/// Whether O_DIRECT works; the outer error is that nothing could be tried.
fn try_direct(directory: &Path) -> io::Result<io::Result<()>> {
    let file = nameless(directory)?;
    // The same file anew, with another flag.
    let again = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap_or(0);
    let direct = OpenOptions::new().write(true).custom_flags(flags).open(again);
    Ok(direct.and_then(|direct| direct.write_all_at(&Sector([0; SECTOR_BYTES]).0, 0)))
}

fn direct_io(look: &Look, place: &Place) -> Check {
    let topic = &topic::DIRECT_IO;
    match try_direct(&place.path) {
        Ok(Ok(())) => Check::ok(topic, place.seen("works")),
        Ok(Err(error)) => Check::problem(
            topic,
            place.seen(&format!("does not work: {error}")),
            "use a directory on ext4, xfs, btrfs, NFS or CephFS: --pool NAME=DIR",
        ),
        Err(error) => untried(look, topic, place, &error),
    }
}

fn untried(look: &Look, topic: &Topic, place: &Place, error: &io::Error) -> Check {
    if error.kind() == io::ErrorKind::PermissionDenied && !look.is_root {
        return Check::needs_root(topic, place.seen("this user may not write there"));
    }
    let mend = look.command(&format!("touch {}/x", place.shown.display()));
    Check::problem(
        topic,
        place.seen(&format!("no file can be made: {error}")),
        format!("see why: {mend}; then dmesg"),
    )
}

fn try_reflink(directory: &Path) -> io::Result<bool> {
    let (mut from, to) = (nameless(directory)?, nameless(directory)?);
    from.write_all(&[0; SECTOR_BYTES])?;
    Ok(rustix::fs::ioctl_ficlone(&to, &from).is_ok())
}

fn reflink(look: &Look, place: &Place) -> Check {
    let topic = &topic::REFLINK;
    match try_reflink(&place.path) {
        Ok(true) => Check::ok(topic, place.seen("yes")),
        // Overlays share blocks anyway: this is no lack.
        Ok(false) => Check::ok(
            topic,
            place.seen("no: a whole copy of a disk takes its time and room (xfs and btrfs can)"),
        ),
        Err(error) => untried(look, topic, place, &error),
    }
}

fn token(look: &Look, directory: &Path) -> Check {
    let topic = &topic::POOL_TOKEN;
    let path = directory.join(TOKEN);
    match look.read(&path) {
        Ok(text) if text.parse::<model::PoolId>().is_ok() => {
            Check::ok(topic, format!("{text}: the same on each host that shares this pool"))
        }
        Ok(_) => Check::problem(
            topic,
            format!("{} holds no id", path.display()),
            "write what the controller shows as this pool's id into it: godwit pool list -o wide",
        ),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Check::ok(
            topic,
            "none yet: the agent writes one where this is a new pool. Where it should be shared, is it mounted?",
        ),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !look.is_root => {
            Check::needs_root(topic, "this user may not look there")
        }
        Err(error) => Check::problem(
            topic,
            format!("{}: {error}", path.display()),
            look.command(&format!("ls -l {}", path.display())),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{State, look::tests::empty};
    use super::*;

    fn place() -> Place {
        Place {
            path: "/".into(),
            shown: "/".into(),
            is_itself: true,
        }
    }

    #[test]
    fn room_is_enough_scarce_or_none() {
        let look = empty().look();
        let of = |use_, free, total| {
            let room = Room {
                free,
                total,
                is_out_of_files: false,
            };
            judge_space(&look, &place(), use_, room).state
        };
        assert_eq!(of(Use::State, 5 * GIB, 10 * GIB), State::Ok);
        assert_eq!(of(Use::State, 500 * MIB, 10 * GIB), State::Warning);
        assert_eq!(of(Use::State, MIB, 10 * GIB), State::Problem);
        assert_eq!(of(Use::Pool, 30 * GIB, 1000 * GIB), State::Ok);
        assert_eq!(of(Use::Pool, 15 * GIB, 1000 * GIB), State::Warning);
        assert_eq!(of(Use::Pool, 500 * MIB, 1000 * GIB), State::Problem);
        let full = Room {
            free: 5 * GIB,
            total: 9 * GIB,
            is_out_of_files: true,
        };
        let check = judge_space(&look, &place(), Use::State, full);
        assert_eq!(check.state, State::Problem);
        assert!(check.seen.contains("no more files") && check.mend.unwrap().contains("du -xh"));
    }

    #[test]
    fn a_file_system_is_fit_for_state_for_a_pool_or_for_neither() {
        let of = |use_, magic| judge_file_system(&place(), use_, magic, false).state;
        let (ext4, nfs, tmpfs, overlay) = (0xef53, 0x6969, 0x0102_1994, 0x794c_7630);
        assert_eq!((of(Use::State, ext4), of(Use::Pool, ext4)), (State::Ok, State::Ok));
        assert_eq!((of(Use::State, nfs), of(Use::Pool, nfs)), (State::Problem, State::Ok));
        assert_eq!(of(Use::State, tmpfs), State::Warning);
        assert_eq!(of(Use::Pool, overlay), State::Warning);
        assert_eq!(of(Use::Pool, 0x1234), State::Ok);
        let read_only = judge_file_system(&place(), Use::Pool, ext4, true);
        assert_eq!(
            (read_only.state, read_only.seen.as_str()),
            (State::Problem, "ext4, mounted read-only")
        );
    }

    #[test]
    fn trials_leave_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let _ = try_direct(directory.path()).unwrap();
        try_reflink(directory.path()).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        assert!(try_direct(&directory.path().join("missing")).is_err());
    }

    #[test]
    fn a_directory_that_is_not_there_yet_is_judged_by_the_one_above_it() {
        let fake = empty().with("/var/lib/keep", "");
        let found = nearest(&fake.look(), Path::new("/var/lib/godwit/pool")).unwrap();
        assert_eq!((found.shown.as_path(), found.is_itself), (Path::new("/var/lib"), false));
        assert_eq!(found.seen("works"), "not there yet; in /var/lib: works");
        let pool = Directory {
            path: "/var/lib/keep/pool".into(),
            use_: Use::Pool,
        };
        let checks = look(&fake.look(), &pool);
        assert_eq!(checks.len(), 5);
        assert!(
            checks.iter().all(|check| check.state == State::Problem),
            "a file is in the way"
        );
        assert_eq!(checks[0].about.as_deref(), Some("/var/lib/keep/pool"));
    }

    #[test]
    fn a_token_is_whole_damaged_or_not_there_yet() {
        let of = |text: &str| token(&empty().with("/p/.godwit-pool", text).look(), Path::new("/p"));
        let id = "0197b2a0-0000-7000-8000-000000000000";
        assert_eq!(of(&format!("{id}\n")).state, State::Ok);
        assert!(of(id).seen.starts_with(id));
        assert_eq!(of("").state, State::Problem);
        let none = token(&empty().look(), Path::new("/p"));
        assert!(none.state == State::Ok && none.seen.contains("is it mounted?"));
    }
}
