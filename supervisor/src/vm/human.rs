//! human-monitor-command, as far as it is not text.

use super::{Vm, block_info, command, looking, query};
use ipc::human::{AddressMap, HumanCommand, HumanReply, WhichCpus};
use ipc::paging::{AddressSpace, Paging};
use ipc::qmp::{KvmInfo, NameInfo, QmpError};
use ipc::vcpu::{VcpuReply, VcpuRequest};

/// Carries a command out. Commands about a vCPU are about the one of `cpu_index`.
///
/// # Errors
/// When there is no such vCPU, or a helper has failed.
pub async fn carry_out(vm: &Vm, command: HumanCommand, cpu_index: Option<i64>) -> Result<HumanReply, QmpError> {
    let current = match (&vm.config.guest, cpu_index) {
        (None, None) => 0,
        _ => looking::vcpu_index(vm, cpu_index)?,
    };
    Ok(match command {
        HumanCommand::Status => HumanReply::Status(command::status(vm)),
        HumanCommand::Name => HumanReply::Name(NameInfo {
            name: vm.config.name.clone(),
        }),
        HumanCommand::Uuid => HumanReply::Uuid(query::uuid_text(vm)),
        HumanCommand::Kvm => HumanReply::Kvm(KvmInfo {
            enabled: vm.config.guest.is_some(),
            present: true,
        }),
        HumanCommand::Cpus => HumanReply::Cpus(command::cpus(vm), current as i64),
        HumanCommand::Block { device } => HumanReply::Block(block_info::human(vm, device.as_deref())),
        HumanCommand::MemoryTree => HumanReply::MemoryTree(address_map(vm).await?),
        HumanCommand::Registers(which) => registers(vm, which, current).await?,
        HumanCommand::Memory {
            is_virtual,
            address,
            length,
        } => {
            let space = if is_virtual {
                AddressSpace::Virtual(paging(vm, cpu_index).await?)
            } else {
                AddressSpace::Physical
            };
            HumanReply::Bytes(looking::read(vm, space, address, length).await?)
        }
        HumanCommand::QemuIo { target, .. } => HumanReply::Refused(format!("Device '{target}' not found")),
        HumanCommand::Translate { address } => {
            let paging = paging(vm, cpu_index).await?;
            HumanReply::Translated(looking::translate(vm, paging, address).await?)
        }
    })
}

async fn paging(vm: &Vm, cpu_index: Option<i64>) -> Result<Paging, QmpError> {
    Ok(Paging::from(&looking::vcpu_registers(vm, cpu_index).await?))
}

async fn registers(vm: &Vm, which: WhichCpus, current: usize) -> Result<HumanReply, QmpError> {
    let all = (0..).zip(looking::registers(vm).await?);
    let wanted = |number: u16| match which {
        WhichCpus::All => true,
        WhichCpus::Current => usize::from(number) == current,
        WhichCpus::Number(wanted) => i64::from(number) == wanted,
    };
    let found: Vec<_> = all.filter(|(number, _)| wanted(*number)).collect();
    Ok(if found.is_empty() {
        HumanReply::NoSuchCpu
    } else {
        HumanReply::Registers(found)
    })
}

async fn address_map(vm: &Vm) -> Result<AddressMap, QmpError> {
    let generic = |error: &dyn std::fmt::Display| QmpError::generic(error.to_string());
    let vcpu = vm.vcpu().map_err(|error| generic(&error))?;
    let answer = vcpu.ask(VcpuRequest::GetAddressMap).await;
    match answer.map_err(|error| generic(&error))? {
        VcpuReply::AddressMap(map) => Ok(map),
        _ => Err(QmpError::generic(
            "vcpu-proc answered the address map request with something else",
        )),
    }
}
