//! The disk: boot loaders, EFI system partition and root file system, written into a sparse file.

use super::gpt::{self, Partition, SECTOR};
use super::root::Tree;
use super::{BuildError, DISK_BYTES, Progress, Step, as_root, failed, found, grub, write};
use crate::process::Run;
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;

const DEADLINE: Duration = Duration::from_secs(600);
const MIB: u64 = (1 << 20) / SECTOR;
/// Where the partitions begin and how long they are, sectors. The root is last, so that it can grow.
const BIOS_FIRST: u64 = MIB;
const BIOS_SECTORS: u64 = MIB;
const ESP_FIRST: u64 = 2 * MIB;
const ESP_SECTORS: u64 = 16 * MIB;
const ROOT_FIRST: u64 = 18 * MIB;

/// What this machine's own mke2fs prefers must not matter: GRUB reads these features, and so does every guest.
const MKE2FS: &str = "\
[defaults]
    base_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr
    default_mntopts = acl,user_xattr
    enable_periodic_fsck = 0
    blocksize = 4096
    inode_size = 256
    inode_ratio = 16384
[fs_types]
    ext4 = {
        features = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
    }
";

/// Makes `scratch/disk.raw` of the tree.
///
/// # Errors
/// When a part cannot be made.
pub(super) fn assemble(scratch: &Path, tree: &Tree, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf, BuildError> {
    let path = scratch.join("disk.raw");
    let file = File::create_new(&path).map_err(failed("create", &path))?;
    file.set_len(DISK_BYTES).map_err(failed("size", &path))?;
    progress(Progress::of(Step::Disk, "making the root file system"));
    let id = |what: &str| {
        let digest = Sha256::new().chain_update(tree.seed).chain_update(what).finalize();
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest[..16]);
        uuid::Builder::from_random_bytes(bytes).into_uuid()
    };
    let sectors = DISK_BYTES / SECTOR;
    let root_sectors = (gpt::usable(sectors).1 - ROOT_FIRST) / MIB * MIB;
    file_system(scratch, tree, &path, root_sectors, id("file system"))?;
    progress(Progress::of(Step::Disk, "making GRUB for BIOS and UEFI"));
    system_partition(scratch, &path, id("ESP"))?;
    let loader = grub::bios(scratch, BIOS_FIRST)?;
    if loader.core.len() as u64 > BIOS_SECTORS * SECTOR {
        return Err(BuildError::Grub {
            path: scratch.join("core.img"),
        });
    }
    let partition = |kind, name, first, sectors| Partition {
        kind,
        id: id(name),
        name,
        first,
        sectors,
    };
    let partitions = [
        partition(gpt::BIOS_BOOT, "bios", BIOS_FIRST, BIOS_SECTORS),
        partition(gpt::EFI_SYSTEM, "efi", ESP_FIRST, ESP_SECTORS),
        partition(gpt::LINUX_ROOT, "root", ROOT_FIRST, root_sectors),
    ];
    file.write_all_at(&loader.core, BIOS_FIRST * SECTOR)
        .and_then(|()| gpt::write(&file, sectors, id("disk"), &partitions, &loader.boot))
        .map_err(failed("write", &path))?;
    Ok(path)
}

fn file_system(scratch: &Path, tree: &Tree, disk: &Path, sectors: u64, id: Uuid) -> Result<(), BuildError> {
    let config = scratch.join("mke2fs.conf");
    write(&config, MKE2FS.as_bytes())?;
    // Tables written now are zeros in a sparse file; left to the guest, it would write them into every overlay.
    let options = format!(
        "offset={},hash_seed={id},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0",
        ROOT_FIRST * SECTOR
    );
    let run = as_root("mke2fs", DEADLINE)
        .args(["-q", "-F", "-t", "ext4", "-L", "rootfs", "-m", "1", "-U"])
        .arg(id.to_string())
        .arg("-E")
        .arg(options)
        .arg("-d")
        .arg(&tree.path)
        .arg(disk)
        .arg(format!("{}k", sectors * SECTOR / 1024));
    let made = run.env("MKE2FS_CONFIG", config).output();
    made.map(drop).map_err(BuildError::program("make the root file system"))
}

/// A FAT file system with the one program that UEFI looks for on a disk it does not know.
fn system_partition(scratch: &Path, disk: &Path, id: Uuid) -> Result<(), BuildError> {
    let program = grub::efi(scratch)?;
    let mut image = disk.as_os_str().to_owned();
    image.push(format!("@@{}", ESP_FIRST * SECTOR));
    let mtool = |name: &str| {
        let tool = found(name).map_or_else(|| name.to_owned(), |path| path.to_string_lossy().into_owned());
        // A person's own settings of mtools must not matter.
        Run::new(&tool, DEADLINE)
            .env("MTOOLSRC", "/dev/null")
            .arg("-i")
            .arg(&image)
    };
    let serial = format!("{:08x}", id.as_fields().0);
    let runs = [
        mtool("mformat")
            .args(["-T", &ESP_SECTORS.to_string(), "-H", &ESP_FIRST.to_string()])
            .args(["-N", &serial, "-v", "EFI", "::"]),
        mtool("mmd").args(["::/EFI", "::/EFI/BOOT"]),
        mtool("mcopy").arg(program).arg("::/EFI/BOOT/BOOTX64.EFI"),
    ];
    for run in runs {
        run.output()
            .map_err(BuildError::program("make the EFI system partition"))?;
    }
    Ok(())
}
