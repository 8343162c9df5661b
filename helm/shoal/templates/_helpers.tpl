{{/* The full name of every object. */}}
{{- define "shoal.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "shoal.namespace" -}}
{{- .Values.namespaceOverride | default .Release.Namespace -}}
{{- end -}}

{{/* What the DaemonSet selects its pods by. Immutable, so nothing that a value or a version can change is in it. */}}
{{- define "shoal.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* The labels of an object: list of the root and maps of labels, of which the later win; the selector's always win. */}}
{{- define "shoal.labels" -}}
{{- $root := first . -}}
{{- $labels := dict
    "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-")
    "app.kubernetes.io/version" $root.Chart.AppVersion
    "app.kubernetes.io/managed-by" $root.Release.Service
    "app.kubernetes.io/part-of" "shoal" -}}
{{- range rest . }}{{ $labels = mergeOverwrite $labels (deepCopy .) }}{{ end -}}
{{- toYaml (mergeOverwrite $labels (include "shoal.selectorLabels" $root | fromYaml)) -}}
{{- end -}}

{{/* The labels of pods: without versions, which would restart every pod for a new chart with the same image. */}}
{{- define "shoal.podLabels" -}}
{{- $selector := include "shoal.selectorLabels" . | fromYaml -}}
{{- toYaml (mergeOverwrite (dict) (deepCopy .Values.commonLabels) (deepCopy .Values.podLabels) $selector) -}}
{{- end -}}

{{- define "shoal.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "shoal.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "shoal.image" -}}
{{- $registry := dig "imageRegistry" "" (.Values.global | default dict) | default .Values.image.registry -}}
{{- $name := printf "%s%s" (empty $registry | ternary "" (printf "%s/" $registry)) .Values.image.repository -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" $name .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* imagePullSecrets as a list of {name}, each once; `global` may have them as names or as objects. */}}
{{- define "shoal.pullSecrets" -}}
{{- $names := list -}}
{{- range concat (dig "imagePullSecrets" list (.Values.global | default dict)) .Values.image.pullSecrets -}}
{{- $names = append $names (kindIs "map" . | ternary (dig "name" "" (kindIs "map" . | ternary . dict)) (toString .)) -}}
{{- end -}}
{{- range uniq $names }}
- name: {{ . | quote }}
{{- end -}}
{{- end -}}

{{/* The capabilities that the tier gives, and the one that asking for MAC addresses takes. */}}
{{- define "shoal.capabilities" -}}
{{- $tiers := dict "counters" list "attribution" (list "NET_ADMIN" "SYS_PTRACE") "full" (list "NET_ADMIN" "SYS_PTRACE" "SYS_ADMIN") -}}
{{- $capabilities := get $tiers .Values.tier -}}
{{- if dig "neighbours" "verify" false .Values.config }}{{ $capabilities = append $capabilities "NET_RAW" }}{{ end -}}
{{- toYaml $capabilities -}}
{{- end -}}

{{/* The whole affinity: what keeps off virtual nodes is added to each of the user's terms, as those are alternatives. */}}
{{- define "shoal.affinity" -}}
{{- $real := list
    (dict "key" "type" "operator" "NotIn" "values" (list "virtual-kubelet"))
    (dict "key" "eks.amazonaws.com/compute-type" "operator" "NotIn" "values" (list "fargate")) -}}
{{- $affinity := deepCopy .Values.affinity -}}
{{- $required := dig "nodeAffinity" "requiredDuringSchedulingIgnoredDuringExecution" "nodeSelectorTerms" (list dict) $affinity -}}
{{- $terms := list -}}
{{- range $required -}}
{{- $terms = append $terms (merge (dict "matchExpressions" (concat (.matchExpressions | default list) $real)) .) -}}
{{- end -}}
{{- $node := dict "nodeAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" (dict "nodeSelectorTerms" $terms)) -}}
{{- toYaml (mergeOverwrite $affinity $node) -}}
{{- end -}}

{{- define "shoal.scheme" -}}
{{- and (not .Values.web.tls) (empty .Values.web.tlsSecret) | ternary "http" "https" -}}
{{- end -}}

{{/* A probe with settings merged over it: list of the root, the path and the settings. */}}
{{- define "shoal.probe" -}}
{{- $root := index . 0 -}}
{{- $get := dict "path" (index . 1) "port" "metrics" "scheme" (include "shoal.scheme" $root | upper) -}}
{{- $probe := $root.Values.web.clientCertificates | ternary (dict "tcpSocket" (dict "port" "metrics")) (dict "httpGet" $get) -}}
{{- toYaml (merge (deepCopy (index . 2)) $probe) -}}
{{- end -}}

{{/* Fails where the kind of a custom resource is not known to the cluster: list of the root, the group and version, and the kind. */}}
{{- define "shoal.needs" -}}
{{- $root := index . 0 -}}{{- $api := printf "%s/%s" (index . 1) (index . 2) -}}
{{- if not ($root.Capabilities.APIVersions.Has $api) -}}
{{- fail (printf "the cluster has no %s: install its CRD first, or leave %s as it is by default. (Without a cluster, as in `helm template`, say --api-versions %s.)" $api (index . 3) $api) -}}
{{- end -}}
{{- end -}}

{{/* What no schema can tell: values that do not go together. */}}
{{- define "shoal.validate" -}}
{{- $verify := dig "neighbours" "verify" false .Values.config -}}
{{- if and $verify (eq .Values.tier "counters") -}}
{{- fail "config.neighbours.verify needs CAP_NET_RAW, which tier counters cannot give; choose tier attribution or full." -}}
{{- end -}}
{{- if and .Values.redis.discover (eq .Values.tier "counters") -}}
{{- fail "redis.discover needs tier attribution for the servers in the node's network, and tier full for those in pods." -}}
{{- end -}}
{{- if and .Values.redis.discover (not .Values.collectors.redis_aof) -}}
{{- fail "redis.discover is on and collectors.redis_aof is off; nobody would look at the servers that are found." -}}
{{- end -}}
{{- if and .Values.redis.targets (not .Values.collectors.redis_aof) -}}
{{- fail "redis.targets has servers and collectors.redis_aof is off; nobody would look at them." -}}
{{- end -}}
{{- range .Values.redis.targets -}}
{{- if and .caSecret (not (hasPrefix "rediss://" .address)) -}}
{{- fail (printf "redis.targets: %s has a caSecret, which only rediss:// has a use for." .address) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.kubernetesEndpoints (or (eq .Values.tier "counters") (not .Values.collectors.conntrack)) -}}
{{- fail "kubernetesEndpoints tells of backends in the connection tracking table: it wants collectors.conntrack, and tier attribution or full." -}}
{{- end -}}
{{- if and .Values.web.clientCertificates (not .Values.web.configSecret) -}}
{{- fail "web.clientCertificates is what a file in web.configSecret asks for; name the Secret." -}}
{{- end -}}
{{- if and .Values.web.tls (not .Values.web.configSecret) (not .Values.web.tlsSecret) -}}
{{- fail "web.tls tells what is in web.configSecret; name that Secret, or one with a certificate in web.tlsSecret." -}}
{{- end -}}
{{- $basic := .Values.monitor.basicAuth -}}
{{- if and $basic (not (and $basic.username $basic.password .Values.web.configSecret)) -}}
{{- fail "monitor.basicAuth wants username and password, and web.configSecret, for otherwise nobody asks for them." -}}
{{- end -}}
{{- if not (has true (values .Values.collectors)) -}}
{{- fail "collectors: every one is off; leave at least one on." -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled .Values.hostNetwork -}}
{{- fail "networkPolicy.enabled has no effect on pods in the node's network; set hostNetwork to false, or protect the port on the nodes." -}}
{{- end -}}
{{- $surge := dig "maxSurge" 0 (.Values.updateStrategy.rollingUpdate | default dict) | toString -}}
{{- if and .Values.hostNetwork (not (has $surge (list "0" "0%"))) -}}
{{- fail "updateStrategy.rollingUpdate.maxSurge wants a second pod on a node whose port the first one has; with hostNetwork it must be 0." -}}
{{- end -}}
{{- end -}}

{{/* The names of the Secrets that Redis targets need, each once, as a list. */}}
{{- define "shoal.redisSecrets" -}}
{{- $names := list -}}
{{- range .Values.redis.targets -}}
{{- with .passwordSecret }}{{ $names = append $names .name }}{{ end -}}
{{- with .caSecret }}{{ $names = append $names .name }}{{ end -}}
{{- end -}}
{{- toYaml (uniq $names) -}}
{{- end -}}
